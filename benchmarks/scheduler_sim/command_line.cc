#include "scheduler_sim/command_line.h"

#include <algorithm>
#include <charconv>
#include <sstream>
#include <system_error>
#include <utility>

#include "common/errors.h"

namespace lora_serve::sim {
namespace {

template <typename Number>
bool SetNumber(const std::string& text, Number& value) {
  const char* const end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, value);
  return error == std::errc() && rest == end;
}

std::string Shown(double value) {
  std::ostringstream text;
  text << value;
  return text.str();
}

}  // namespace

void CommandLine::Add(const std::string& name, std::int64_t& value, const std::string& help) {
  options_.push_back({name, std::to_string(value), help,
                      [&value](const std::string& text) { return SetNumber(text, value); }});
}

void CommandLine::Add(const std::string& name, std::int32_t& value, const std::string& help) {
  options_.push_back({name, std::to_string(value), help,
                      [&value](const std::string& text) { return SetNumber(text, value); }});
}

void CommandLine::Add(const std::string& name, double& value, const std::string& help) {
  options_.push_back({name, Shown(value), help,
                      [&value](const std::string& text) { return SetNumber(text, value); }});
}

void CommandLine::Add(const std::string& name, bool& value, const std::string& help) {
  options_.push_back({name, value ? "1" : "0", help, [&value](const std::string& text) {
                        if (text != "0" && text != "1") return false;
                        value = text == "1";
                        return true;
                      }});
}

void CommandLine::Add(const std::string& name, std::string& value, const std::string& help) {
  options_.push_back({name, value, help, [&value](const std::string& text) {
                        value = text;
                        return true;
                      }});
}

void CommandLine::Parse(const std::vector<std::string>& arguments) const {
  for (std::size_t index = 0; index < arguments.size(); ++index) {
    const std::string& argument = arguments[index];
    const std::size_t equals = argument.find('=');
    const std::string name = argument.substr(0, equals);
    const auto option = std::ranges::find_if(
        options_, [&](const Option& item) { return "--" + item.name == name; });
    if (option == options_.end()) {
      throw InvalidArgumentError("unknown option '" + name + "'; --help lists them");
    }
    std::string value;
    if (equals != std::string::npos) {
      value = argument.substr(equals + 1);
    } else if (++index < arguments.size()) {
      value = arguments[index];
    } else {
      throw InvalidArgumentError("option " + name + " lacks its value");
    }
    if (!option->set(value)) {
      throw InvalidArgumentError("option " + name + ": '" + value + "' is no such value; " +
                                 option->help);
    }
  }
}

std::string CommandLine::Help() const {
  std::string text;
  for (const Option& option : options_) {
    text += "  --" + option.name + " (" + option.default_value + ")\n      " + option.help + '\n';
  }
  return text;
}

}  // namespace lora_serve::sim

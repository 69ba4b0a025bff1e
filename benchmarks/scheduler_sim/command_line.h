#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace lora_serve::sim {

/// Options of the form --name VALUE or --name=VALUE, each bound to a variable.
class CommandLine {
 public:
  void Add(const std::string& name, std::int64_t& value, const std::string& help);
  void Add(const std::string& name, std::int32_t& value, const std::string& help);
  void Add(const std::string& name, double& value, const std::string& help);
  /// 0 or 1.
  void Add(const std::string& name, bool& value, const std::string& help);
  void Add(const std::string& name, std::string& value, const std::string& help);

  /// Throws: InvalidArgumentError naming an option that is unknown, lacks its value, or has one
  /// that is not of its kind.
  void Parse(const std::vector<std::string>& arguments) const;
  /// Each option with its default and its help, one a line.
  [[nodiscard]] std::string Help() const;

 private:
  struct Option {
    std::string name;
    std::string default_value;
    std::string help;
    /// False when the text is no such value.
    std::function<bool(const std::string&)> set;
  };
  std::vector<Option> options_;
};

}  // namespace lora_serve::sim

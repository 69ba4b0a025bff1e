#include "scheduler_sim/device_model.h"

#include <cmath>
#include <cstdlib>

#include "common/errors.h"

namespace lora_serve::sim {
namespace {

double ValueOf(const std::map<std::string, double>& values, const std::string& name,
               double missing = 0.0) {
  const auto found = values.find(name);
  return found == values.end() ? missing : found->second;
}

LoadPathModel LoadPathOf(const std::map<std::string, double>& values, const std::string& name) {
  const std::string prefix = "loads." + name + '.';
  LoadPathModel path{
      .fixed_ms = ValueOf(values, prefix + "fixed_ms"),
      .gb_per_s = ValueOf(values, prefix + "gb_per_s"),
      .num_parallel = static_cast<std::int32_t>(ValueOf(values, prefix + "num_parallel", 1.0)),
      .step_slowdown = ValueOf(values, prefix + "step_slowdown")};
  if (!(path.gb_per_s > 0.0) || path.num_parallel < 1) {
    throw InvalidArgumentError("device model: " + prefix +
                               "gb_per_s must be above 0 and num_parallel at least 1");
  }
  return path;
}

TimeUs ToUs(double ms) { return std::llround(ms * 1000.0); }

}  // namespace

void StepShape::AddRow(std::int64_t num_tokens, std::int64_t num_computed_tokens,
                       bool has_adapter) {
  if (num_tokens == 1) {
    ++num_decode_rows;
    num_context_tokens += num_computed_tokens + 1;
    num_lora_decode_rows += has_adapter;
    return;
  }
  const auto tokens = static_cast<double>(num_tokens);
  num_prefill_tokens += num_tokens;
  num_prefill_pairs += tokens * (static_cast<double>(num_computed_tokens) + tokens / 2.0);
  if (has_adapter) num_lora_prefill_tokens += num_tokens;
}

TimeUs LoadPathModel::LoadUs(std::int64_t num_bytes) const {
  return ToUs(fixed_ms + static_cast<double>(num_bytes) / (gb_per_s * 1e6));
}

DeviceModel DeviceModel::Read(std::istream& input) {
  std::map<std::string, double> values;
  std::string line;
  while (std::getline(input, line)) {
    if (line.empty() || line[0] == '#') continue;
    const std::size_t equals = line.find('=');
    const std::string text = equals == std::string::npos ? "" : line.substr(equals + 1);
    char* end = nullptr;
    double value = std::strtod(text.c_str(), &end);
    if (text == "true" || text == "false") {
      value = text == "true" ? 1.0 : 0.0;
    } else if (text.empty() || *end != '\0') {
      throw InvalidArgumentError("device model: expected name=number, found '" + line + "'");
    }
    values[line.substr(0, equals)] = value;
  }
  return DeviceModel(values);
}

DeviceModel::DeviceModel(const std::map<std::string, double>& values)
    : host_to_device_(LoadPathOf(values, "host_to_device")),
      disk_warm_to_host_(LoadPathOf(values, "disk_warm_to_host")),
      disk_cold_to_host_(LoadPathOf(values, "disk_cold_to_host")),
      adapter_bytes_per_rank_(ValueOf(values, "adapter_bytes_per_rank")) {
  const auto ms = [&](const std::string& name) { return ValueOf(values, "step." + name); };
  step_ = {.base = ms("base_ms"),
           .decode_row = 1e-3 * ms("per_row_us"),
           .context_token = 1e-6 * ms("per_context_ns"),
           .prefill_token = 1e-3 * ms("per_prefill_token_us"),
           .prefill_pair = 1e-6 * ms("per_prefill_pair_ns"),
           .prefill_step = ms("prefill_step_ms"),
           .lora_enabled = ms("lora_enabled_ms"),
           .lora_base = ms("lora_base_ms"),
           .lora_adapter = 1e-3 * ms("lora_per_adapter_us"),
           .lora_adapter_rank = 1e-3 * ms("lora_per_adapter_rank_us"),
           .lora_place = 1e-3 * ms("lora_per_place_us"),
           .lora_row = 1e-3 * ms("lora_per_row_us"),
           .lora_prefill_token = 1e-3 * ms("lora_per_prefill_token_us"),
           .lora_prefill_token_place = 1e-6 * ms("lora_per_prefill_token_place_ns"),
           .pads_to_max_rank = ms("pads_to_max_rank") != 0.0};
  if (!(step_.base > 0.0)) throw InvalidArgumentError("device model: step.base_ms is missing");
}

TimeUs DeviceModel::StepUs(const StepShape& shape, const EngineOptions& engine) const {
  if (shape.num_decode_rows == 0 && shape.num_prefill_tokens == 0) return 0;
  const auto times = [](double coefficient, auto count) {
    return coefficient * static_cast<double>(count);
  };
  double ms = step_.base + times(step_.decode_row, shape.num_decode_rows) +
              times(step_.context_token, shape.num_context_tokens) +
              times(step_.prefill_token, shape.num_prefill_tokens) +
              times(step_.prefill_pair, shape.num_prefill_pairs);
  if (shape.num_prefill_tokens > 0) ms += step_.prefill_step;
  if (engine.has_lora_enabled) ms += step_.lora_enabled;
  if (shape.num_adapters > 0) {
    const std::int64_t sum_ranks =
        step_.pads_to_max_rank ? shape.num_adapters * engine.max_lora_rank : shape.sum_ranks;
    ms += step_.lora_base + times(step_.lora_adapter, shape.num_adapters) +
          times(step_.lora_adapter_rank, sum_ranks) + times(step_.lora_place, engine.num_places) +
          times(step_.lora_row, shape.num_lora_decode_rows) +
          times(step_.lora_prefill_token, shape.num_lora_prefill_tokens) +
          times(step_.lora_prefill_token_place, shape.num_lora_prefill_tokens * engine.num_places);
  }
  return ToUs(ms);
}

std::int64_t DeviceModel::AdapterBytes(std::int64_t lora_rank) const {
  return std::llround(adapter_bytes_per_rank_ * static_cast<double>(lora_rank));
}

}  // namespace lora_serve::sim

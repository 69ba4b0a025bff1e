#pragma once

#include <cstdint>
#include <istream>
#include <map>
#include <string>

#include "scheduler_sim/sim_request.h"

namespace lora_serve::sim {

/// What one step holds, as far as its time depends on it.
struct StepShape {
  /// Rows of one token.
  std::int64_t num_decode_rows = 0;
  /// Tokens in the contexts of these rows.
  std::int64_t num_context_tokens = 0;
  /// Tokens of the other rows.
  std::int64_t num_prefill_tokens = 0;
  /// Sum over these rows of n * (c + n / 2): n tokens after c computed ones.
  double num_prefill_pairs = 0.0;
  std::int64_t num_lora_decode_rows = 0;
  std::int64_t num_lora_prefill_tokens = 0;
  /// Distinct adapters, and the sum of their lora_ranks.
  std::int64_t num_adapters = 0;
  std::int64_t sum_ranks = 0;

  /// Adds one row.
  void AddRow(std::int64_t num_tokens, std::int64_t num_computed_tokens, bool has_adapter);
};

/// One way of an adapter's bytes.
struct LoadPathModel {
  double fixed_ms = 0.0;
  double gb_per_s = 1.0;
  /// Loads at once that do not slow each other; more wait.
  std::int32_t num_parallel = 1;
  /// Steps take 1 + this times as long while a load is under way.
  double step_slowdown = 0.0;

  [[nodiscard]] TimeUs LoadUs(std::int64_t num_bytes) const;
};

/// How long a device takes for steps and loads. The equation and its coefficients are described in
/// README.md; fit_device_model.py fits them to measurements.
class DeviceModel {
 public:
  struct EngineOptions {
    /// max_loras and max_lora_rank that the engine was started with.
    std::int64_t num_places = 1;
    std::int64_t max_lora_rank = 16;
    bool has_lora_enabled = true;
  };

  /// Reads lines `name=number` (names of device_models.json, nested ones joined by a dot). Missing
  /// coefficients are 0; true and false are 1 and 0.
  /// Throws: InvalidArgumentError when a line is not of this form.
  [[nodiscard]] static DeviceModel Read(std::istream& input);

  /// Time of a step; 0 when it has no rows.
  [[nodiscard]] TimeUs StepUs(const StepShape& shape, const EngineOptions& engine) const;

  [[nodiscard]] const LoadPathModel& host_to_device() const { return host_to_device_; }
  [[nodiscard]] const LoadPathModel& disk_to_host(bool is_cold) const {
    return is_cold ? disk_cold_to_host_ : disk_warm_to_host_;
  }
  [[nodiscard]] std::int64_t AdapterBytes(std::int64_t lora_rank) const;

 private:
  /// In milliseconds, each for one of what it is named after.
  struct StepCoefficients {
    double base = 0.0;
    double decode_row = 0.0;
    double context_token = 0.0;
    double prefill_token = 0.0;
    double prefill_pair = 0.0;
    double prefill_step = 0.0;
    double lora_enabled = 0.0;
    double lora_base = 0.0;
    double lora_adapter = 0.0;
    double lora_adapter_rank = 0.0;
    double lora_place = 0.0;
    double lora_row = 0.0;
    double lora_prefill_token = 0.0;
    double lora_prefill_token_place = 0.0;
    bool pads_to_max_rank = false;
  };

  explicit DeviceModel(const std::map<std::string, double>& values);

  StepCoefficients step_;
  LoadPathModel host_to_device_;
  LoadPathModel disk_warm_to_host_;
  LoadPathModel disk_cold_to_host_;
  double adapter_bytes_per_rank_ = 0.0;
};

}  // namespace lora_serve::sim

#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "scheduler_sim/adapter_catalog.h"
#include "scheduler_sim/device_model.h"
#include "scheduler_sim/request_source.h"
#include "scheduler_sim/serving_system.h"
#include "scheduler_sim/starvation_bound.h"

namespace lora_serve::sim {

/// Everything that a run is told, as it stands on the command line.
struct SimOptions {
  // --- System ---
  std::string system = "lora_serve";
  std::string device_path;
  std::int32_t num_places = 8;
  /// Device memory in adapters of the largest rank; 0 = as many as places.
  std::int64_t num_memory_adapters = 0;
  std::int64_t num_host_adapters = 0;
  bool has_cold_disk = false;
  std::int64_t num_kv_tokens = 300'000;
  std::int64_t num_host_kv_tokens = 0;
  std::int32_t page_size = 16;
  std::int32_t max_num_seqs = 128;
  std::int32_t max_num_batched_tokens = 2048;
  bool enable_prefix_caching = true;

  // --- lora_serve ---
  bool has_overlap = true;
  std::int64_t plan_lead_us = -1;
  std::int64_t host_us = 300;
  std::int32_t max_loading_adapters = 4;
  bool loads_staged_only = false;
  std::int64_t adapter_patience_us = 0;
  std::int32_t adapter_time_slice_steps = 0;
  std::int64_t adapter_pause_us = 75'000;
  std::int32_t max_loras = 0;
  std::string scheduling_policy = "fair";
  std::int64_t deadline_ms = 0;
  std::int32_t max_queued_requests = 0;
  std::int64_t steps_between_checks = 0;

  // --- sglang_like ---
  double drain_threshold_s = 3.0;

  // --- Workload ---
  WorkloadOptions workload;
  std::int64_t seed = 1;
  std::string popularity = "uniform";
  std::string lora_ranks = "16";

  // --- Output ---
  std::string label;
  std::string csv_path;
  std::string quantiles_path;
  /// Above 0: the run fails when a request has waited for more steps than this for its first token.
  std::int64_t check_bound_steps = 0;
  /// lora_serve: the run fails when a request has waited longer than the scheduler's bound.
  bool check_bound = false;
};

/// Throws: InvalidArgumentError.
[[nodiscard]] SimOptions ParseSimOptions(const std::vector<std::string>& arguments);
/// For --help.
[[nodiscard]] std::string SimOptionsHelp();

[[nodiscard]] std::vector<std::int64_t> ParseRanks(const std::string& text);
/// The system that `options.system` names: lora_serve, vllm_like or sglang_like.
/// Throws: InvalidArgumentError when there is none, or an option is out of range.
[[nodiscard]] std::unique_ptr<ServingSystem> MakeSystem(const SimOptions& options,
                                                        const DeviceModel& model,
                                                        const AdapterCatalog& catalog);
/// What the scheduler's bound is for these options. Steps of a load or a wait are counted as if
/// each step were the shortest possible.
[[nodiscard]] BoundInputs BoundInputsOf(const SimOptions& options, const DeviceModel& model,
                                        const AdapterCatalog& catalog,
                                        const std::vector<RequestRecord>& requests);
/// What tells the rows of a CSV file apart.
[[nodiscard]] std::vector<std::pair<std::string, std::string>> LabelsOf(const SimOptions& options);

}  // namespace lora_serve::sim

#include "scheduler_sim/sim_options.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <map>

#include "common/errors.h"
#include "scheduler_sim/command_line.h"
#include "scheduler_sim/scheduler_system.h"
#include "scheduler_sim/sglang_like_system.h"
#include "scheduler_sim/vllm_like_system.h"

namespace lora_serve::sim {
namespace {

template <typename Value>
Value ChoiceOf(const std::string& what, const std::string& name,
               const std::map<std::string, Value>& choices) {
  const auto found = choices.find(name);
  if (found != choices.end()) return found->second;
  std::string names;
  for (const auto& [choice, value] : choices) names += ' ' + choice;
  throw InvalidArgumentError("--" + what + " '" + name + "' is unknown; expected one of" + names);
}

void BindSystem(CommandLine& line, SimOptions& options) {
  line.Add("system", options.system, "lora_serve, vllm_like or sglang_like");
  line.Add("device", options.device_path, "file of name=number lines; see device_models.json");
  line.Add("places", options.num_places, "distinct adapters of a step (max_loras)");
  line.Add("memory-adapters", options.num_memory_adapters,
           "device memory in adapters of the largest rank; 0 = as many as places");
  line.Add("host-adapters", options.num_host_adapters,
           "host memory in adapters of the largest rank; 0 = all fit");
  line.Add("cold-disk", options.has_cold_disk, "1 = adapter files are not in the page cache");
  line.Add("kv-tokens", options.num_kv_tokens, "tokens of the device's KV pages");
  line.Add("host-kv-tokens", options.num_host_kv_tokens, "of the host's; lora_serve only");
  line.Add("page-size", options.page_size, "tokens");
  line.Add("max-num-seqs", options.max_num_seqs, "requests that run at once");
  line.Add("max-num-batched-tokens", options.max_num_batched_tokens, "tokens of a step");
  line.Add("prefix-caching", options.enable_prefix_caching, "0 or 1");
  line.Add("overlap", options.has_overlap, "lora_serve: plan the next step while one runs");
  line.Add("plan-lead-us", options.plan_lead_us,
           "lora_serve: make it this long before that one ends; -1 = when it starts");
  line.Add("host-us", options.host_us, "lora_serve: from a plan to its start on an idle device");
  line.Add("max-loading-adapters", options.max_loading_adapters, "lora_serve: loads at once");
  line.Add("loads-staged-only", options.loads_staged_only,
           "lora_serve: 1 = read ahead, and load only what is in host memory");
  line.Add("adapter-patience-us", options.adapter_patience_us,
           "lora_serve: wait before one of the adapters in place is closed to newcomers");
  line.Add("adapter-time-slice-steps", options.adapter_time_slice_steps,
           "lora_serve: steps after which an adapter in place may be paused; 0 = never");
  line.Add("adapter-pause-us", options.adapter_pause_us,
           "lora_serve: a paused adapter waits that long before another is paused for it");
  line.Add("max-loras", options.max_loras,
           "lora_serve: adapters in place at once, whatever the places are; 0 = places");
  line.Add("scheduling-policy", options.scheduling_policy, "lora_serve: fair, fcfs or lpm");
  line.Add("deadline-ms", options.deadline_ms, "lora_serve: of each request; 0 = none");
  line.Add("max-queued-requests", options.max_queued_requests, "lora_serve: 0 = no limit");
  line.Add("steps-between-checks", options.steps_between_checks,
           "lora_serve: check its invariants this often; 0 = only at the end");
  line.Add("drain-threshold-s", options.drain_threshold_s,
           "sglang_like: wait after which an adapter drains for another");
}

void BindWorkload(CommandLine& line, SimOptions& options) {
  WorkloadOptions& workload = options.workload;
  line.Add("seed", options.seed, "of everything random");
  line.Add("requests", workload.num_requests, "how many");
  line.Add("adapters", workload.popularity.num_adapters, "how many");
  line.Add("lora-ranks", options.lora_ranks, "given to the adapters in turns, as 8,16,64");
  line.Add("popularity", options.popularity, "uniform, zipf, skewed or drifting");
  line.Add("zipf-exponent", workload.popularity.zipf_exponent, "of zipf and drifting");
  line.Add("skew-fraction", workload.popularity.skew_fraction, "of the adapters, that is popular");
  line.Add("skew-share", workload.popularity.skew_share, "of the requests, that they get");
  line.Add("drift-period-us", workload.popularity.drift_period_us, "between two moves");
  line.Add("drift-step", workload.popularity.drift_step, "places by which the ranking moves");
  line.Add("base-share", workload.popularity.base_share, "of the requests, without adapter");
  line.Add("prompt-tokens", workload.prompt_length, "a number, or lognormal:MEAN:CV");
  line.Add("output-tokens", workload.output_length, "a number, or lognormal:MEAN:CV");
  line.Add("shared-tokens", workload.num_shared_tokens,
           "leading prompt tokens that the requests of an adapter share");
  line.Add("early-stop-share", workload.early_stop_share,
           "of the requests, that end before max_tokens");
  line.Add("max-model-len", workload.max_model_len, "prompt and output tokens");
  line.Add("rate", workload.arrivals.requests_per_s, "requests/s; closed loop: of the first ones");
  line.Add("burst-factor", workload.arrivals.burst_factor, "rate in a burst / mean; 1 = Poisson");
  line.Add("burst-share", workload.arrivals.burst_share, "of the time");
  line.Add("burst-s", workload.arrivals.burst_s, "mean length of a burst");
  line.Add("clients", workload.num_clients, "above 0: a closed loop of so many");
  line.Add("think-us", workload.think_us, "closed loop: from an answer to the next request");
  line.Add("trace", workload.trace_path, "requests of this trace (Mooncake's format) instead");
  line.Add("trace-speed", workload.trace_speed, "divides the trace's timestamps");
}

CommandLine BindOptions(SimOptions& options) {
  CommandLine line;
  BindSystem(line, options);
  BindWorkload(line, options);
  line.Add("label", options.label, "first column of the CSV");
  line.Add("csv", options.csv_path, "write names and values there");
  line.Add("quantiles", options.quantiles_path, "write quantiles of TTFT, ITL and E2E there");
  line.Add("check-bound-steps", options.check_bound_steps,
           "fail when a request waits for more steps than this; 0 = do not check");
  line.Add("check-bound", options.check_bound,
           "lora_serve: fail when a request waits longer than the scheduler's README allows");
  return line;
}

SchedulerSystemOptions SchedulerOptionsOf(const SimOptions& options,
                                          const AdapterCatalog& catalog) {
  SchedulerSystemOptions result;
  SchedulerOptions& scheduler = result.scheduler;
  scheduler.page_size = options.page_size;
  scheduler.num_device_pages = static_cast<std::int32_t>(options.num_kv_tokens / options.page_size);
  scheduler.num_host_pages =
      static_cast<std::int32_t>(options.num_host_kv_tokens / options.page_size);
  scheduler.max_num_seqs = options.max_num_seqs;
  scheduler.max_num_batched_tokens = options.max_num_batched_tokens;
  scheduler.max_model_len = options.workload.max_model_len;
  scheduler.max_loras = options.max_loras > 0 ? options.max_loras : options.num_places;
  scheduler.enable_prefix_caching = options.enable_prefix_caching;
  const std::int64_t num_adapters =
      options.num_memory_adapters > 0 ? options.num_memory_adapters : options.num_places;
  scheduler.adapter_memory_bytes = num_adapters * catalog.MaxBytes();
  scheduler.max_loading_adapters = options.max_loading_adapters;
  scheduler.loads_staged_only = options.loads_staged_only;
  scheduler.adapter_patience_us = options.adapter_patience_us;
  scheduler.adapter_time_slice_steps = options.adapter_time_slice_steps;
  scheduler.adapter_pause_us = options.adapter_pause_us;
  scheduler.scheduling_policy =
      ChoiceOf<SchedulingPolicy>("scheduling-policy", options.scheduling_policy,
                                 {{"fair", SchedulingPolicy::kFair},
                                  {"fcfs", SchedulingPolicy::kFcfs},
                                  {"lpm", SchedulingPolicy::kLpm}});
  scheduler.max_queued_requests = options.max_queued_requests;
  result.has_cold_disk = options.has_cold_disk;
  result.max_host_bytes = options.num_host_adapters * catalog.MaxBytes();
  result.has_overlap = options.has_overlap;
  result.plan_lead_us = options.plan_lead_us;
  result.host_us = options.host_us;
  result.deadline_us = options.deadline_ms * 1000;
  result.steps_between_checks = options.steps_between_checks;
  return result;
}

}  // namespace

SimOptions ParseSimOptions(const std::vector<std::string>& arguments) {
  SimOptions options;
  BindOptions(options).Parse(arguments);
  options.workload.seed = static_cast<std::uint64_t>(options.seed);
  options.workload.popularity.kind =
      ChoiceOf<PopularityKind>("popularity", options.popularity,
                               {{"uniform", PopularityKind::kUniform},
                                {"zipf", PopularityKind::kZipf},
                                {"skewed", PopularityKind::kSkewed},
                                {"drifting", PopularityKind::kDrifting}});
  return options;
}

std::string SimOptionsHelp() {
  SimOptions options;
  return BindOptions(options).Help();
}

std::vector<std::int64_t> ParseRanks(const std::string& text) {
  std::vector<std::int64_t> ranks;
  const char* at = text.data();
  const char* const end = at + text.size();
  for (;;) {
    std::int64_t rank = 0;
    const auto [rest, error] = std::from_chars(at, end, rank);
    if (error != std::errc() || rank < 1 || (rest != end && *rest != ',')) {
      throw InvalidArgumentError("--lora-ranks '" + text + "': expected numbers as 8,16,64");
    }
    ranks.push_back(rank);
    if (rest == end) return ranks;
    at = rest + 1;
  }
}

std::unique_ptr<ServingSystem> MakeSystem(const SimOptions& options, const DeviceModel& model,
                                          const AdapterCatalog& catalog) {
  const DeviceModel::EngineOptions engine{.num_places = options.num_places,
                                          .max_lora_rank = catalog.MaxRank()};
  if (options.system == "lora_serve") {
    SchedulerSystemOptions scheduler = SchedulerOptionsOf(options, catalog);
    scheduler.engine = engine;
    return std::make_unique<SchedulerSystem>(scheduler, model, catalog);
  }
  const BaselineOptions baseline{
      .engine = engine,
      .has_cold_disk = options.has_cold_disk,
      .max_host_bytes = options.num_host_adapters * catalog.MaxBytes(),
      .max_num_seqs = options.max_num_seqs,
      .max_num_batched_tokens = options.max_num_batched_tokens,
      .page_size = options.page_size,
      .num_device_pages = static_cast<std::int32_t>(options.num_kv_tokens / options.page_size),
      .enable_prefix_caching = options.enable_prefix_caching};
  if (options.system == "vllm_like") {
    return std::make_unique<VllmLikeSystem>(baseline, model, catalog);
  }
  if (options.system == "sglang_like") {
    const auto threshold_us = static_cast<TimeUs>(options.drain_threshold_s * 1e6);
    return std::make_unique<SglangLikeSystem>(baseline, threshold_us, model, catalog);
  }
  throw InvalidArgumentError("--system '" + options.system +
                             "' is unknown; expected lora_serve, vllm_like or sglang_like");
}

BoundInputs BoundInputsOf(const SimOptions& options, const DeviceModel& model,
                          const AdapterCatalog& catalog,
                          const std::vector<RequestRecord>& requests) {
  const SchedulerOptions scheduler = SchedulerOptionsOf(options, catalog).scheduler;
  std::int64_t longest = 1;
  for (const RequestRecord& request : requests) {
    const std::int64_t num_chunks = request.num_prompt_tokens / options.max_num_batched_tokens + 1;
    longest = std::max(longest, num_chunks + request.num_output_tokens);
  }
  StepShape shortest;
  shortest.AddRow(1, 0, false);
  const auto step_us =
      static_cast<double>(model.StepUs(shortest, {.num_places = options.num_places}));
  const auto steps_of = [&](TimeUs time_us) {
    return static_cast<std::int64_t>(std::ceil(static_cast<double>(time_us) / step_us));
  };
  const std::int64_t bytes = catalog.MaxBytes();
  const std::int64_t num_fitting =
      std::min<std::int64_t>(scheduler.max_loras, scheduler.adapter_memory_bytes / bytes);
  const TimeUs load_us = model.disk_to_host(options.has_cold_disk).LoadUs(bytes) +
                         model.host_to_device().LoadUs(bytes);
  return {.num_adapters = catalog.size(),
          .num_fitting = num_fitting,
          .max_num_seqs = options.max_num_seqs,
          .num_request_steps = longest,
          .num_load_steps = steps_of(num_fitting * load_us),
          .num_slice_steps = options.adapter_time_slice_steps,
          .num_patience_steps = steps_of(options.adapter_patience_us)};
}

std::vector<std::pair<std::string, std::string>> LabelsOf(const SimOptions& options) {
  return {{"scenario", options.label}, {"system", options.system}};
}

}  // namespace lora_serve::sim

#pragma once

#include <cstdint>
#include <fstream>
#include <memory>
#include <optional>
#include <queue>
#include <string>
#include <unordered_map>

#include "scheduler_sim/adapter_popularity.h"
#include "scheduler_sim/arrival_process.h"
#include "scheduler_sim/length_distribution.h"
#include "scheduler_sim/sim_request.h"
#include "scheduler_sim/trace_reader.h"

namespace lora_serve::sim {

/// Where requests come from. They are made one by one, when they arrive, so that a run of a million
/// holds only those that are under way.
class RequestSource {
 public:
  virtual ~RequestSource() = default;
  /// When the next one arrives; kNever when none does unless others end first.
  [[nodiscard]] virtual TimeUs NextArrivalUs() const = 0;
  /// Requires: NextArrivalUs() is not kNever.
  [[nodiscard]] virtual SimRequest Take() = 0;
  /// A request has ended.
  virtual void OnRequestEnd(TimeUs /*now_us*/) {}
};

/// What all requests of a run have in common.
struct WorkloadOptions {
  std::uint64_t seed = 1;
  std::int64_t num_requests = 1000;
  PopularityOptions popularity;
  std::string prompt_length = "128";
  std::string output_length = "64";
  /// Leading prompt tokens that all requests of one adapter share.
  std::int32_t num_shared_tokens = 0;
  /// Share of the requests that a stop token ends before max_tokens, anywhere.
  double early_stop_share = 0.0;
  /// Prompt and output together.
  std::int32_t max_model_len = 4096;

  ArrivalOptions arrivals;
  /// Above 0: a closed loop of this many clients instead of the arrivals; each sends its next
  /// request `think_us` after its last has ended.
  std::int64_t num_clients = 0;
  TimeUs think_us = 0;
  /// Not empty: requests of a trace instead, their timestamps divided by `trace_speed`.
  std::string trace_path;
  double trace_speed = 1.0;
};

/// Throws: InvalidArgumentError when an option is out of range, or the trace cannot be read.
[[nodiscard]] std::unique_ptr<RequestSource> MakeRequestSource(const WorkloadOptions& options);

/// Requests with random prompts, in an open or a closed loop.
class SyntheticSource : public RequestSource {
 public:
  explicit SyntheticSource(const WorkloadOptions& options);
  [[nodiscard]] TimeUs NextArrivalUs() const override;
  [[nodiscard]] SimRequest Take() override;
  void OnRequestEnd(TimeUs now_us) override;

 private:
  void DrawArrival();

  WorkloadOptions options_;
  ArrivalProcess arrivals_;
  AdapterPopularity popularity_;
  LengthDistribution prompt_lengths_;
  LengthDistribution output_lengths_;
  RandomStream length_random_;
  RandomStream stop_random_;
  std::int64_t num_taken_ = 0;
  TimeUs next_arrival_us_ = kNever;
  /// Closed loop: when clients send their next requests.
  std::priority_queue<TimeUs, std::vector<TimeUs>, std::greater<>> client_times_us_;
};

/// The requests of a trace. Those that go on from each other (same hash id behind the first block)
/// use the same adapter, because a conversation does; the first of each is assigned by popularity.
class TraceSource : public RequestSource {
 public:
  explicit TraceSource(const WorkloadOptions& options);
  [[nodiscard]] TimeUs NextArrivalUs() const override;
  [[nodiscard]] SimRequest Take() override;

 private:
  void ReadNext();
  [[nodiscard]] AdapterPopularity::Choice ChooseAdapter(const TraceRequest& request);

  WorkloadOptions options_;
  std::ifstream file_;
  TraceReader reader_;
  AdapterPopularity popularity_;
  std::unordered_map<std::int64_t, AdapterPopularity::Choice> adapter_of_block_;
  std::int64_t num_taken_ = 0;
  std::optional<TraceRequest> next_;
};

}  // namespace lora_serve::sim

#pragma once

#include <cstdint>
#include <vector>

#include "scheduler_sim/device_model.h"
#include "scheduler_sim/latency_histogram.h"
#include "scheduler_sim/sim_request.h"

namespace lora_serve::sim {

/// What became of one request.
struct RequestRecord {
  TimeUs arrival_us = 0;
  /// Start of the first step with a row of it; -1 before.
  TimeUs first_step_us = -1;
  TimeUs first_token_us = -1;
  TimeUs last_token_us = -1;
  std::int32_t num_prompt_tokens = 0;
  std::int32_t num_output_tokens = 0;
  std::int32_t num_tokens = 0;
  /// Steps that had started at its arrival; from its first token on, those that started in between.
  std::int32_t num_waited_steps = 0;
  /// 1 = none of its adapter's requests waited for its first step when it arrived.
  std::int32_t queue_position = 0;
  std::int64_t adapter_id = 0;
  bool is_rare = false;
  bool has_ended = false;
  bool was_refused = false;
};

/// Sums over the steps of a run.
struct StepSums {
  std::int64_t num_steps = 0;
  std::int64_t num_rows = 0;
  std::int64_t num_prefill_tokens = 0;
  std::int64_t num_adapters = 0;
  TimeUs busy_us = 0;
  /// Time in which the device waited for a load within the step loop.
  TimeUs stall_us = 0;
};

/// Takes down what happens to requests and steps, whichever system serves them, and throws
/// InternalError when a request gets a token that it must not get, or ends twice.
class Recorder {
 public:
  void OnArrival(const SimRequest& request);
  /// The request is refused, or expires: it gets nothing.
  void OnRefused(std::int64_t id);
  /// A row of the request is in the step that starts now.
  void OnRow(std::int64_t id, TimeUs start_us);
  /// Returns true when the request has ended with this token.
  bool OnToken(std::int64_t id, TimeUs now_us);
  void OnStep(const StepShape& shape, std::int64_t num_rows, TimeUs step_us, TimeUs stall_us);

  /// Throws: InternalError unless every request has ended exactly once.
  void CheckAllEnded() const;

  [[nodiscard]] const std::vector<RequestRecord>& requests() const { return requests_; }
  [[nodiscard]] const StepSums& steps() const { return steps_; }
  [[nodiscard]] const LatencyHistogram& itl() const { return itl_; }
  [[nodiscard]] const LatencyHistogram& rare_itl() const { return rare_itl_; }
  [[nodiscard]] std::int64_t num_ended() const { return num_ended_; }
  [[nodiscard]] std::int64_t num_refused() const { return num_refused_; }
  [[nodiscard]] std::int64_t num_live() const {
    return std::ssize(requests_) - num_ended_ - num_refused_;
  }

 private:
  std::vector<RequestRecord> requests_;  // by id
  /// Requests without a first step, of each adapter; by its id.
  std::vector<std::int32_t> num_queued_;
  StepSums steps_;
  /// Between two tokens of a request; of all, and of those of rare adapters.
  LatencyHistogram itl_;
  LatencyHistogram rare_itl_;
  std::int64_t num_ended_ = 0;
  std::int64_t num_refused_ = 0;
};

}  // namespace lora_serve::sim

#include "scheduler_sim/recorder.h"

#include "common/check.h"

namespace lora_serve::sim {

void Recorder::OnArrival(const SimRequest& request) {
  LS_CHECK(request.id == std::ssize(requests_), "request ", request.id, " is out of order");
  const auto adapter = static_cast<std::size_t>(request.adapter_id);
  if (num_queued_.size() <= adapter) num_queued_.resize(adapter + 1);
  requests_.push_back(
      {.arrival_us = request.arrival_us,
       .num_prompt_tokens = static_cast<std::int32_t>(request.prompt_token_ids.size()),
       .num_output_tokens = request.num_output_tokens,
       .num_waited_steps = static_cast<std::int32_t>(steps_.num_steps),
       .queue_position = ++num_queued_[adapter],
       .adapter_id = request.adapter_id,
       .is_rare = request.is_rare});
}

void Recorder::OnRefused(std::int64_t id) {
  RequestRecord& request = requests_.at(static_cast<std::size_t>(id));
  LS_CHECK(!request.has_ended && !request.was_refused && request.num_tokens == 0, "request ", id);
  request.was_refused = true;
  if (request.first_step_us < 0) --num_queued_[static_cast<std::size_t>(request.adapter_id)];
  ++num_refused_;
}

void Recorder::OnRow(std::int64_t id, TimeUs start_us) {
  RequestRecord& request = requests_[static_cast<std::size_t>(id)];
  if (request.first_step_us >= 0) return;
  request.first_step_us = start_us;
  --num_queued_[static_cast<std::size_t>(request.adapter_id)];
}

bool Recorder::OnToken(std::int64_t id, TimeUs now_us) {
  RequestRecord& request = requests_.at(static_cast<std::size_t>(id));
  LS_CHECK(!request.has_ended && !request.was_refused, "request ", id, " has ended already");
  if (request.num_tokens == 0) {
    request.first_token_us = now_us;
    request.num_waited_steps =
        static_cast<std::int32_t>(steps_.num_steps) - request.num_waited_steps;
  } else {
    itl_.Add(now_us - request.last_token_us);
    if (request.is_rare) rare_itl_.Add(now_us - request.last_token_us);
  }
  request.last_token_us = now_us;
  ++request.num_tokens;
  request.has_ended = request.num_tokens == request.num_output_tokens;
  num_ended_ += request.has_ended;
  return request.has_ended;
}

void Recorder::OnStep(const StepShape& shape, std::int64_t num_rows, TimeUs step_us,
                      TimeUs stall_us) {
  ++steps_.num_steps;
  steps_.num_rows += num_rows;
  steps_.num_prefill_tokens += shape.num_prefill_tokens;
  steps_.num_adapters += shape.num_adapters;
  steps_.busy_us += step_us;
  steps_.stall_us += stall_us;
}

void Recorder::CheckAllEnded() const {
  for (std::size_t id = 0; id < requests_.size(); ++id) {
    const RequestRecord& request = requests_[id];
    LS_CHECK(request.was_refused ||
                 (request.has_ended && request.num_tokens == request.num_output_tokens),
             "request ", id, " has ", request.num_tokens, " of ", request.num_output_tokens,
             " tokens");
  }
}

}  // namespace lora_serve::sim

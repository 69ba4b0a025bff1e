#include "scheduler_sim/request_source.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "common/errors.h"
#include "scheduler_sim/prompt_tokens.h"

namespace lora_serve::sim {
namespace {

constexpr std::uint64_t kLengthPurpose = 4;
constexpr std::uint64_t kStopPurpose = 5;
constexpr std::uint64_t kPromptPurpose = 6;
constexpr std::uint64_t kSharedPurpose = 7;

std::uint64_t SeedOf(std::uint64_t seed, std::uint64_t purpose, std::int64_t index) {
  return Scramble(seed * 16 + purpose) ^ static_cast<std::uint64_t>(index);
}

}  // namespace

std::unique_ptr<RequestSource> MakeRequestSource(const WorkloadOptions& options) {
  if (options.num_requests < 1 || options.max_model_len < 2) {
    throw InvalidArgumentError("a run needs at least 1 request and a max_model_len of at least 2");
  }
  if (!options.trace_path.empty()) return std::make_unique<TraceSource>(options);
  return std::make_unique<SyntheticSource>(options);
}

SyntheticSource::SyntheticSource(const WorkloadOptions& options)
    : options_(options),
      arrivals_(options.arrivals, options.seed),
      popularity_(options.popularity, options.seed),
      prompt_lengths_(LengthDistribution::Parse(options.prompt_length)),
      output_lengths_(LengthDistribution::Parse(options.output_length)),
      length_random_(options.seed, kLengthPurpose),
      stop_random_(options.seed, kStopPurpose) {
  if (options_.num_clients > 0) {
    // Clients start one after another, as the first arrivals of an open loop would.
    const std::int64_t num_first = std::min(options_.num_clients, options_.num_requests);
    for (std::int64_t client = 0; client < num_first; ++client) {
      client_times_us_.push(arrivals_.Next());
    }
  } else {
    next_arrival_us_ = arrivals_.Next();
  }
}

TimeUs SyntheticSource::NextArrivalUs() const {
  if (num_taken_ == options_.num_requests) return kNever;
  if (options_.num_clients == 0) return next_arrival_us_;
  return client_times_us_.empty() ? kNever : client_times_us_.top();
}

void SyntheticSource::DrawArrival() {
  if (options_.num_clients > 0) {
    client_times_us_.pop();
  } else {
    next_arrival_us_ = arrivals_.Next();
  }
}

void SyntheticSource::OnRequestEnd(TimeUs now_us) {
  if (options_.num_clients > 0) client_times_us_.push(now_us + options_.think_us);
}

SimRequest SyntheticSource::Take() {
  SimRequest request;
  request.id = num_taken_;
  request.arrival_us = NextArrivalUs();
  const AdapterPopularity::Choice choice = popularity_.Choose(request.arrival_us);
  request.adapter_id = choice.adapter_id;
  request.is_rare = choice.is_rare;
  const std::int32_t num_prompt_tokens =
      prompt_lengths_.Draw(length_random_, options_.max_model_len - 1);
  request.max_tokens =
      output_lengths_.Draw(length_random_, options_.max_model_len - num_prompt_tokens);
  request.num_output_tokens = request.max_tokens;
  const bool stops_early = stop_random_.NextUniform() < options_.early_stop_share;
  const std::int64_t stop_after = 1 + stop_random_.NextBelow(request.max_tokens);
  if (stops_early) request.num_output_tokens = static_cast<std::int32_t>(stop_after);

  const std::int32_t num_shared = std::min(options_.num_shared_tokens, num_prompt_tokens);
  request.prompt_token_ids.reserve(static_cast<std::size_t>(num_prompt_tokens));
  AppendTokens(request.prompt_token_ids, SeedOf(options_.seed, kSharedPurpose, request.adapter_id),
               num_shared);
  AppendTokens(request.prompt_token_ids, SeedOf(options_.seed, kPromptPurpose, request.id),
               num_prompt_tokens - num_shared);
  ++num_taken_;
  DrawArrival();
  return request;
}

TraceSource::TraceSource(const WorkloadOptions& options)
    : options_(options),
      file_(options.trace_path),
      reader_(file_),
      popularity_(options.popularity, options.seed) {
  if (!file_) throw InvalidArgumentError("cannot read the trace '" + options.trace_path + "'");
  if (!(options_.trace_speed > 0.0)) throw InvalidArgumentError("trace speed must be above 0");
  ReadNext();
  if (!next_) {
    throw InvalidArgumentError("the trace '" + options.trace_path + "' has no request of at most " +
                               std::to_string(options.max_model_len) + " tokens");
  }
}

/// Passes over requests that are longer than the model allows.
void TraceSource::ReadNext() {
  do {
    next_ = reader_.Next();
  } while (next_ && (next_->num_prompt_tokens < 1 || next_->num_output_tokens < 1 ||
                     next_->num_prompt_tokens + next_->num_output_tokens > options_.max_model_len));
}

TimeUs TraceSource::NextArrivalUs() const {
  if (!next_ || num_taken_ == options_.num_requests) return kNever;
  return std::llround(static_cast<double>(next_->arrival_us) / options_.trace_speed);
}

AdapterPopularity::Choice TraceSource::ChooseAdapter(const TraceRequest& request) {
  // Drawn always, so that what one request continues does not move the others.
  AdapterPopularity::Choice choice = popularity_.Choose(NextArrivalUs());
  for (std::size_t index = request.hash_ids.size(); index-- > 1;) {
    const auto known = adapter_of_block_.find(request.hash_ids[index]);
    if (known == adapter_of_block_.end()) continue;
    choice = known->second;
    break;
  }
  for (std::size_t index = 1; index < request.hash_ids.size(); ++index) {
    adapter_of_block_.try_emplace(request.hash_ids[index], choice);
  }
  return choice;
}

SimRequest TraceSource::Take() {
  SimRequest request;
  request.id = num_taken_;
  request.arrival_us = NextArrivalUs();
  const AdapterPopularity::Choice choice = ChooseAdapter(*next_);
  request.adapter_id = choice.adapter_id;
  request.is_rare = choice.is_rare;
  request.prompt_token_ids = TracePromptTokens(*next_);
  request.max_tokens = next_->num_output_tokens;
  request.num_output_tokens = next_->num_output_tokens;
  ++num_taken_;
  ReadNext();
  return request;
}

}  // namespace lora_serve::sim

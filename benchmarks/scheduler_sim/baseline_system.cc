#include "scheduler_sim/baseline_system.h"

#include <utility>

#include "common/check.h"
#include "scheduler_sim/prompt_tokens.h"

namespace lora_serve::sim {

BaselineSystem::BaselineSystem(const BaselineOptions& options, const DeviceModel& model,
                               const AdapterCatalog& catalog)
    : options_(options),
      model_(model),
      catalog_(catalog),
      cache_({.page_size = options.page_size,
              .num_device_pages = options.num_device_pages,
              .enable_prefix_reuse = options.enable_prefix_caching}),
      host_(catalog, options.max_host_bytes) {
  // As after a warm-up: the slots are full.
  for (std::int64_t id = 1; id <= std::min(catalog.size(), options.engine.num_places); ++id) {
    slots_.Touch(id);
  }
}

void BaselineSystem::Submit(SimRequest request, TimeUs /*now_us*/) {
  recorder_.OnArrival(request);
  auto added = std::make_unique<BaselineRequest>();
  added->order = next_order_++;
  added->tokens = std::move(request.prompt_token_ids);
  added->request = std::move(request);
  OnArrival(std::move(added));
}

void BaselineSystem::Process(TimeUs now_us) {
  if (step_end_us_ <= now_us) EndStep(now_us);
  if (step_end_us_ != kNever) return;
  const TimeUs stall_us = ChooseRows(now_us);
  if (!rows_.empty()) StartStep(now_us, stall_us);
}

NamespaceId BaselineSystem::NamespaceOf(std::int64_t adapter_id) {
  if (adapter_id == kBaseAdapter.value()) return kBaseNamespace;
  const auto [entry, is_new] = namespaces_.try_emplace(adapter_id);
  if (is_new) {
    entry->second = cache_.OpenNamespace({.digest_seed = static_cast<std::uint64_t>(adapter_id)});
  }
  return entry->second;
}

BaselineRequest* BaselineSystem::Admit(std::int64_t adapter_id) {
  const BaselineRequest& first = waiting_.HeadOf(adapter_id);
  const auto num_tokens = static_cast<std::int32_t>(first.tokens.size());
  const NamespaceHandle handle = cache_.RetainNamespace(NamespaceOf(adapter_id));
  AcquireResult result =
      cache_.Acquire(handle, first.tokens,
                     {.max_cached_tokens = num_tokens - 1,
                      .num_capacity_tokens = num_tokens + first.request.max_tokens});
  if (result.outcome != AcquireOutcome::kAcquired) return nullptr;
  running_.push_back(waiting_.Pop(adapter_id));
  BaselineRequest& request = *running_.back();
  request.lease = std::move(result.lease);
  request.num_computed_tokens = request.lease.num_cached_tokens();
  counts_.num_queried_tokens += num_tokens;
  counts_.num_hit_tokens += request.num_computed_tokens;
  return &request;
}

TimeUs BaselineSystem::LoadForStep(const std::set<std::int64_t>& adapters) {
  for (const std::int64_t id : adapters) {
    if (slots_.Contains(id)) slots_.Touch(id);
    if (host_.Contains(id)) host_.Touch(id);
  }
  const auto may_go = [&](std::int64_t id) { return !adapters.contains(id); };
  TimeUs stall_us = 0;
  for (const std::int64_t id : adapters) {
    if (slots_.Contains(id)) continue;
    const TimeUs read_us = BringToHost(id, may_go);
    LS_CHECK(read_us >= 0, "the host tier holds fewer adapters than one step needs");
    if (read_us == 0) ++counts_.num_host_loads;
    if (std::cmp_greater_equal(slots_.size(), options_.engine.num_places)) {
      slots_.Erase(slots_.Oldest(may_go));
      ++counts_.num_evictions;
    }
    slots_.Touch(id);
    stall_us += read_us + model_.host_to_device().LoadUs(catalog_.BytesOf(id));
  }
  return stall_us;
}

void BaselineSystem::StartStep(TimeUs now_us, TimeUs stall_us) {
  StepShape shape;
  std::set<std::int64_t> adapters;
  for (const Row& row : rows_) {
    const std::int64_t adapter = row.request->adapter_id();
    const bool has_adapter = adapter != kBaseAdapter.value();
    shape.AddRow(row.num_tokens, row.request->num_computed_tokens, has_adapter);
    if (!has_adapter || !adapters.insert(adapter).second) continue;
    ++shape.num_adapters;
    shape.sum_ranks += catalog_.RankOf(adapter);
  }
  stall_us += LoadForStep(adapters);
  const TimeUs start_us = now_us + stall_us;
  const TimeUs step_us = model_.StepUs(shape, options_.engine);
  step_end_us_ = start_us + step_us;
  for (const Row& row : rows_) recorder_.OnRow(row.request->request.id, start_us);
  recorder_.OnStep(shape, std::ssize(rows_), step_us, stall_us);
}

void BaselineSystem::EndStep(TimeUs now_us) {
  step_end_us_ = kNever;
  bool has_any_ended = false;
  for (const Row& row : rows_) {
    BaselineRequest& request = *row.request;
    request.num_computed_tokens += row.num_tokens;
    if (request.num_missing_tokens() > 0) continue;
    const std::int64_t id = request.request.id;
    const bool has_ended = recorder_.OnToken(id, now_us);
    if (has_ended || request.num_sampled_tokens == 0) {
      cache_.Publish(request.lease, request.tokens);
    }
    request.tokens.push_back(OutputToken(id, request.num_sampled_tokens++));
    if (!has_ended) continue;
    request.lease = Lease();
    has_any_ended = true;
    OnEnd(request.adapter_id());
  }
  rows_.clear();
  if (!has_any_ended) return;
  std::erase_if(running_, [&](const auto& request) {
    return recorder_.requests()[static_cast<std::size_t>(request->request.id)].has_ended;
  });
}

void BaselineSystem::CheckNothingLeft() const {
  LS_CHECK(waiting_.empty() && running_.empty() && cache_.Stats().num_private_pages == 0,
           "a baseline has requests or pages left");
}

}  // namespace lora_serve::sim

#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "kv_prefix_cache/kv_prefix_cache.h"
#include "scheduler/adapter_table.h"
#include "scheduler/page_table_rows.h"
#include "scheduler/request_table.h"
#include "scheduler/scheduler_options.h"

namespace lora_serve::testing {

/// The tables that the scheduler's policies work on, without the policies.
class SchedulerParts {
 public:
  explicit SchedulerParts(const SchedulerOptions& options)
      : cache({.page_size = options.page_size,
               .num_device_pages = options.num_device_pages,
               .num_host_pages = options.num_host_pages}),
        rows(options.max_num_seqs),
        adapters(&cache, options),
        requests(&adapters, options) {}

  Adapter& Open(std::int64_t id, const AdapterOptions& options = {}) {
    adapters.Open(AdapterId(id), options);
    return adapters.GetOpen(AdapterId(id));
  }
  Adapter& OpenResident(std::int64_t id, const AdapterOptions& options = {}) {
    EXPECT_TRUE(adapters.Open(AdapterId(id), options)) << "there is no room for adapter " << id;
    static_cast<void>(adapters.TakeDue());
    adapters.OnLoaded(AdapterId(id));
    return adapters.GetOpen(AdapterId(id));
  }
  /// What tests say of a request. Without a prompt it gets two tokens of its own, without an
  /// arrival the next microsecond.
  struct Asked {
    std::vector<TokenId> prompt_token_ids = {};
    std::int32_t max_tokens = 1;
    std::int32_t priority = 0;
    std::int64_t arrival_us = -1;
  };
  /// A queued request. Ids count from 0.
  Request& Queue(Adapter& adapter, Asked asked) {
    const std::int64_t id = next_id_++;
    if (asked.prompt_token_ids.empty()) {
      asked.prompt_token_ids.assign(2, static_cast<TokenId>(id));
    }
    requests.Add({.request_id = RequestId(id),
                  .adapter_id = adapter.id,
                  .prompt_token_ids = std::move(asked.prompt_token_ids),
                  .max_tokens = asked.max_tokens,
                  .priority = asked.priority,
                  .arrival_us = asked.arrival_us < 0 ? id : asked.arrival_us},
                 adapter, cache.RetainNamespace(adapter.namespace_id));
    return *requests.Find(RequestId(id));
  }
  Request& Queue(Adapter& adapter) { return Queue(adapter, Asked{}); }
  /// Admits a request that waits.
  void Start(Request& request) {
    AcquireResult acquired = cache.Acquire(request.waiting_handle(), request.tokens(),
                                           {.max_cached_tokens = request.num_tokens() - 1,
                                            .num_capacity_tokens = request.num_tokens()});
    ASSERT_EQ(acquired.outcome, AcquireOutcome::kAcquired);
    requests.Admit(request, rows.Take(), std::move(acquired.lease));
  }
  Request& QueueAndStart(Adapter& adapter, std::int32_t max_tokens = 1) {
    Request& request = Queue(adapter, {.max_tokens = max_tokens});
    Start(request);
    return request;
  }
  void End(Request& request) { requests.Abort(request); }

  void CheckInvariants() const {
    cache.CheckInvariants();
    rows.CheckInvariants();
    adapters.CheckInvariants();
    requests.CheckInvariants();
  }

  // In the order of lifetime.
  KVPrefixCache cache;
  PageTableRows rows;
  AdapterTable adapters;
  RequestTable requests;

 private:
  std::int64_t next_id_ = 0;
};

}  // namespace lora_serve::testing

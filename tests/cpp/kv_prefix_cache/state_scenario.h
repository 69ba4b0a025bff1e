#pragma once

#include <initializer_list>
#include <optional>
#include <utility>
#include <vector>

#include "cache_scenario.h"

namespace lora_serve {

/// Scenarios about recurrent state itself: snapshots stand only where the test says.
class StateScenario : public CacheScenario {
 protected:
  void OpenWithSlots(std::int32_t num_device_slots, std::int32_t num_host_slots = kPlenty) {
    KVPrefixCacheOptions options = OptionsWith(kPlenty);
    options.num_device_state_slots = num_device_slots;
    options.num_host_state_slots = HasHost() ? num_host_slots : 0;
    OpenWith(options);
  }
  /// Publishes `tokens` with snapshots after `boundaries` tokens and nowhere else.
  std::vector<StateSlot> PublishWith(Lease& lease, const Tokens& tokens,
                                     std::initializer_list<std::int32_t> boundaries) {
    std::vector<StateSlot> slots;
    for (const std::int32_t boundary : boundaries) {
      const std::optional<StateSlot> slot = cache_->ReserveSnapshot(lease, boundary);
      EXPECT_TRUE(slot) << "after " << boundary << " tokens";
      slots.push_back(slot.value_or(kNoStateSlot));
      cache_->Publish(lease, FirstTokens(tokens, boundary));
    }
    cache_->Publish(lease, tokens);
    cache_->CheckInvariants();
    return slots;
  }
  std::vector<StateSlot> CacheWith(const Tokens& tokens,
                                   std::initializer_list<std::int32_t> boundaries) {
    Lease lease = Acquire(tokens, 0);
    return PublishWith(lease, tokens, boundaries);
  }
  /// Leases that take every slot, and so all unpinned snapshots of the device; then they end.
  void EvictDeviceSnapshots() {
    std::vector<Lease> leases;
    for (std::int64_t i = 0; i < cache_->Stats().num_device_state_slots; ++i) {
      AcquireResult result = TryAcquire({}, 0);
      if (result.outcome == AcquireOutcome::kNoRoom) break;
      leases.push_back(std::move(result.lease));
    }
  }
  std::int64_t NumSnapshots() const { return StatsOf(id_).num_device_snapshots; }
};

}  // namespace lora_serve

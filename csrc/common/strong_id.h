#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <ostream>

namespace lora_serve {

/// An integer that cannot be mistaken for another kind of integer.
///
/// `Tag` is never defined; it only makes two ids different types. Ids are compared, hashed and
/// printed, never added. `Rep` is the integer that crosses the Python border.
template <typename Tag, typename Rep>
class StrongId {
 public:
  using RepType = Rep;

  constexpr StrongId() = default;
  constexpr explicit StrongId(Rep value) : value_(value) {}

  [[nodiscard]] constexpr Rep value() const { return value_; }

  friend constexpr auto operator<=>(StrongId, StrongId) = default;
  friend std::ostream& operator<<(std::ostream& os, StrongId id) { return os << id.value_; }

 private:
  Rep value_{};
};

/// A token of the vocabulary. Plain, because spans of it come straight from NumPy arrays.
using TokenId = std::int32_t;

using PageId = StrongId<struct PageIdTag, std::int32_t>;
/// Room for the recurrent state of one sequence, on the device or on the host.
using StateSlot = StrongId<struct StateSlotTag, std::int32_t>;
/// A copy between the tiers; counts up, never reused.
using TransferId = StrongId<struct TransferIdTag, std::int64_t>;
/// Unique in one cache, never reused. 0 is the base model's namespace.
using NamespaceId = StrongId<struct NamespaceIdTag, std::int64_t>;
/// Chosen by the caller, unique among the scheduler's live requests.
using RequestId = StrongId<struct RequestIdTag, std::int64_t>;
/// An adapter generation: process-unique, never reused. 0 is the base model.
using AdapterId = StrongId<struct AdapterIdTag, std::int64_t>;
/// Index into the device tables of adapters; -1 means "no adapter".
using AdapterSlot = StrongId<struct AdapterSlotTag, std::int32_t>;
/// Row of the executor's page table, owned by one running request at a time.
using PageTableRow = StrongId<struct PageTableRowTag, std::int32_t>;
using PlanId = StrongId<struct PlanIdTag, std::int64_t>;

inline constexpr NamespaceId kBaseNamespace{0};
inline constexpr AdapterId kBaseAdapter{0};
inline constexpr AdapterSlot kNoAdapterSlot{-1};
inline constexpr StateSlot kNoStateSlot{-1};
inline constexpr TransferId kNoTransfer{-1};

}  // namespace lora_serve

template <typename Tag, typename Rep>
struct std::hash<lora_serve::StrongId<Tag, Rep>> {
  std::size_t operator()(lora_serve::StrongId<Tag, Rep> id) const noexcept {
    return std::hash<Rep>{}(id.value());
  }
};

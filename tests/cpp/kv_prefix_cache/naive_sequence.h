#pragma once

#include <algorithm>
#include <cstddef>
#include <map>
#include <span>
#include <vector>

#include "common/strong_id.h"

// How the naive model names things: a page is known by its namespace and all tokens from the first
// one of the sequence to the last one of the page; a snapshot by those up to its boundary.

namespace lora_serve {

using Tokens = std::vector<TokenId>;

/// True also when both are the same.
inline bool Continues(std::span<const TokenId> longer, std::span<const TokenId> prefix) {
  return longer.size() >= prefix.size() && std::equal(prefix.begin(), prefix.end(), longer.begin());
}

/// For look-ups without a copy of the tokens.
struct SequenceView {
  NamespaceId ns;
  std::span<const TokenId> tokens;
};

struct SequenceKey {
  NamespaceId ns;
  Tokens tokens;

  operator SequenceView() const { return {ns, tokens}; }  // NOLINT: the two are one thing
  friend bool operator==(const SequenceKey&, const SequenceKey&) = default;
};

/// By namespace, then lexicographic: what continues a sequence comes right after it.
struct SequenceLess {
  using is_transparent = void;
  bool operator()(const SequenceView& a, const SequenceView& b) const {
    if (a.ns != b.ns) return a.ns < b.ns;
    return std::ranges::lexicographical_compare(a.tokens, b.tokens);
  }
};

inline bool Continues(const SequenceView& longer, const SequenceView& prefix) {
  return longer.ns == prefix.ns && Continues(longer.tokens, prefix.tokens);
}

/// A page or a snapshot in one tier.
struct Resident {
  static constexpr std::int32_t kUnknown = -1;

  /// PageId or StateSlot. The model does not choose ids: it is told those of the real cache.
  std::int32_t id = kUnknown;
  std::int64_t last_use = 0;
  bool is_in_flight = false;
};

using ResidentMap = std::map<SequenceKey, Resident, SequenceLess>;

}  // namespace lora_serve

#pragma once

#include "common/strong_id.h"

namespace lora_serve {

class Namespace;

/// Keeps one namespace alive. Move-only; dropping it may complete a drain.
///
/// Owns one count in `Namespace::num_handles`. A request holds one from its arrival to its end,
/// queued and preempted included, so that its namespace cannot vanish while it waits.
class NamespaceHandle {
 public:
  NamespaceHandle() = default;
  ~NamespaceHandle();
  NamespaceHandle(NamespaceHandle&& other) noexcept;
  NamespaceHandle& operator=(NamespaceHandle&& other) noexcept;
  NamespaceHandle(const NamespaceHandle&) = delete;
  NamespaceHandle& operator=(const NamespaceHandle&) = delete;

  /// Requires: not moved from.
  [[nodiscard]] NamespaceId id() const;
  [[nodiscard]] explicit operator bool() const { return namespace_backptr_ != nullptr; }

 private:
  friend class KVPrefixCache;
  explicit NamespaceHandle(Namespace* ns);
  void Reset() noexcept;

  Namespace* namespace_backptr_ = nullptr;
};

}  // namespace lora_serve

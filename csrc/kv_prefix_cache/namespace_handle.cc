#include "kv_prefix_cache/namespace_handle.h"

#include <utility>

#include "common/check.h"
#include "kv_prefix_cache/kv_prefix_cache_impl.h"

namespace lora_serve {

NamespaceHandle::NamespaceHandle(Namespace* ns) : namespace_backptr_(ns) { ns->AddHandle(); }

NamespaceHandle::~NamespaceHandle() { Reset(); }

NamespaceHandle::NamespaceHandle(NamespaceHandle&& other) noexcept
    : namespace_backptr_(std::exchange(other.namespace_backptr_, nullptr)) {}

NamespaceHandle& NamespaceHandle::operator=(NamespaceHandle&& other) noexcept {
  if (this == &other) return *this;
  Reset();
  namespace_backptr_ = std::exchange(other.namespace_backptr_, nullptr);
  return *this;
}

NamespaceId NamespaceHandle::id() const {
  LS_CHECK(namespace_backptr_ != nullptr, "this namespace handle is empty or was moved from");
  return namespace_backptr_->id();
}

void NamespaceHandle::Reset() noexcept {
  if (namespace_backptr_ == nullptr) return;
  Namespace& ns = *std::exchange(namespace_backptr_, nullptr);
  ns.cache_backptr()->ReleaseHandle(ns);
}

}  // namespace lora_serve

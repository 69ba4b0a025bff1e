#include "naive_cache.h"

#include <algorithm>

namespace lora_serve {
namespace {

bool Continues(const std::vector<TokenId>& longer, const std::vector<TokenId>& prefix) {
  return longer.size() >= prefix.size() && std::equal(prefix.begin(), prefix.end(), longer.begin());
}

}  // namespace

NaiveCache::NaiveCache(std::int32_t page_size, std::int32_t num_pages)
    : page_size_(static_cast<std::size_t>(page_size)), num_pages_(num_pages) {
  Open(kBaseNamespace);
}

void NaiveCache::DropHandle(NamespaceId id) {
  --namespaces_.at(id).num_handles;
  DestroyIfAbandoned(id);
}

void NaiveCache::Drain(NamespaceId id) {
  namespaces_.at(id).is_draining = true;
  DropUnprotected(id);
  DestroyIfAbandoned(id);
}

std::vector<NamespaceId> NaiveCache::NamespaceIds() const {
  std::vector<NamespaceId> ids;
  for (const auto& [id, ns] : namespaces_) ids.push_back(id);
  return ids;
}

std::int32_t NaiveCache::Probe(NamespaceId id, std::span<const TokenId> tokens) const {
  std::size_t num_pages = 0;
  while ((num_pages + 1) * page_size_ <= tokens.size() &&
         pages_.contains({id, Prefix(tokens, num_pages + 1)})) {
    ++num_pages;
  }
  return static_cast<std::int32_t>(num_pages * page_size_);
}

std::optional<std::vector<PageId>> NaiveCache::Acquire(int lease, NamespaceId id,
                                                       std::span<const TokenId> tokens,
                                                       std::int32_t max_cached_tokens,
                                                       std::int32_t num_capacity_tokens) {
  const auto num_cached_tokens = static_cast<std::size_t>(
      Probe(id, tokens.first(static_cast<std::size_t>(max_cached_tokens))));
  const std::size_t num_cached_pages = num_cached_tokens / page_size_;
  const auto capacity = static_cast<std::size_t>(num_capacity_tokens);
  const std::size_t num_capacity_pages = (capacity + page_size_ - 1) / page_size_;

  NaiveLease added{.ns = id,
                   .published = Prefix(tokens, num_cached_pages),
                   .pages = {},
                   .is_private = std::vector<bool>(num_cached_pages, false)};
  for (std::size_t page = 1; page <= num_cached_pages; ++page) {
    added.pages.push_back(pages_.at({id, Prefix(tokens, page)}).id);
  }
  const std::vector<PageId> cached_pages = added.pages;
  const Tokens published = added.published;
  leases_[lease] = std::move(added);  // protects its prefix while room is made
  if (num_capacity_pages > num_cached_pages &&
      !MakeRoom(static_cast<std::int64_t>(num_capacity_pages - num_cached_pages))) {
    leases_.erase(lease);
    return std::nullopt;
  }
  Use(id, published);
  return cached_pages;
}

bool NaiveCache::Extend(int lease, std::int32_t num_capacity_tokens) {
  const auto capacity = static_cast<std::size_t>(num_capacity_tokens);
  const std::size_t num_pages = (capacity + page_size_ - 1) / page_size_;
  const std::size_t num_pages_now = leases_.at(lease).pages.size();
  return num_pages <= num_pages_now ||
         MakeRoom(static_cast<std::int64_t>(num_pages - num_pages_now));
}

std::string NaiveCache::GiveFreshPages(int lease, std::span<const PageId> all_pages) {
  NaiveLease& given = leases_.at(lease);
  for (std::size_t index = given.pages.size(); index < all_pages.size(); ++index) {
    const PageId page = all_pages[index];
    if (page.value() < 0 || page.value() >= num_pages_) return "page id out of range";
    for (const auto& [key, cached] : pages_) {
      if (cached.id == page) return "a fresh page is in the tree";
    }
    for (const auto& [other, holder] : leases_) {
      for (std::size_t i = 0; i < holder.pages.size(); ++i) {
        if (holder.is_private[i] && holder.pages[i] == page) return "a fresh page is leased";
      }
    }
    given.pages.push_back(page);
    given.is_private.push_back(true);
  }
  return "";
}

void NaiveCache::Publish(int lease, std::span<const TokenId> tokens) {
  NaiveLease& publisher = leases_.at(lease);
  const std::size_t num_pages = tokens.size() / page_size_;
  if (namespaces_.at(publisher.ns).is_draining) return;
  if (num_pages * page_size_ <= publisher.published.size()) return;
  for (std::size_t page = publisher.published.size() / page_size_; page < num_pages; ++page) {
    const Key key{publisher.ns, Prefix(tokens, page + 1)};
    if (pages_.try_emplace(key, Page{publisher.pages[page], 0}).second) {
      publisher.is_private[page] = false;
    }
  }
  publisher.published = Prefix(tokens, num_pages);
  Use(publisher.ns, publisher.published);
}

void NaiveCache::Release(int lease) {
  const NaiveLease released = leases_.at(lease);
  Use(released.ns, released.published);
  leases_.erase(lease);
  if (namespaces_.at(released.ns).is_draining) DropUnprotected(released.ns);
  DestroyIfAbandoned(released.ns);
}

std::int64_t NaiveCache::Evict(std::int64_t num_pages) {
  std::int64_t num_evicted = 0;
  while (num_evicted < num_pages) {
    auto victim = pages_.end();
    for (auto it = pages_.begin(); it != pages_.end(); ++it) {
      if (HasContinuation(it->first) || IsProtected(it->first)) continue;
      if (victim == pages_.end() || it->second.last_use < victim->second.last_use) victim = it;
    }
    if (victim == pages_.end()) break;
    pages_.erase(victim);
    ++num_evicted;
  }
  num_evicted_pages_ += num_evicted;
  return num_evicted;
}

bool NaiveCache::MakeRoom(std::int64_t num_pages) {
  if (num_pages > NumAvailablePages()) return false;
  if (num_pages > num_free_pages()) Evict(num_pages - num_free_pages());
  return true;
}

std::int64_t NaiveCache::num_free_pages() const {
  std::int64_t num_private = 0;
  for (const auto& [id, ns] : namespaces_) num_private += NumPrivatePages(id);
  return num_pages_ - static_cast<std::int64_t>(pages_.size()) - num_private;
}

std::int64_t NaiveCache::NumAvailablePages() const {
  return num_free_pages() + std::ranges::count_if(pages_, [this](const auto& entry) {
           return !IsProtected(entry.first);
         });
}

std::int64_t NaiveCache::NumTreePages(NamespaceId id) const {
  return std::ranges::count_if(pages_, [id](const auto& entry) { return entry.first.ns == id; });
}

std::int64_t NaiveCache::NumPrivatePages(NamespaceId id) const {
  std::int64_t num_pages = 0;
  for (const auto& [number, lease] : leases_) {
    if (lease.ns == id) num_pages += std::ranges::count(lease.is_private, true);
  }
  return num_pages;
}

std::int64_t NaiveCache::NumLeases(NamespaceId id) const {
  return std::ranges::count_if(leases_, [id](const auto& entry) { return entry.second.ns == id; });
}

NaiveCache::Tokens NaiveCache::Prefix(std::span<const TokenId> tokens,
                                      std::size_t num_pages) const {
  const auto prefix = tokens.first(num_pages * page_size_);
  return {prefix.begin(), prefix.end()};
}

bool NaiveCache::IsProtected(const Key& key) const {
  return std::ranges::any_of(leases_, [&key](const auto& entry) {
    return entry.second.ns == key.ns && Continues(entry.second.published, key.prefix);
  });
}

bool NaiveCache::HasContinuation(const Key& key) const {
  const auto next =
      pages_.upper_bound(key);  // in lexicographic order continuations come right after
  return next != pages_.end() && next->first.ns == key.ns &&
         Continues(next->first.prefix, key.prefix);
}

void NaiveCache::Use(NamespaceId id, const Tokens& prefix) {
  ++now_;
  for (std::size_t num_tokens = page_size_; num_tokens <= prefix.size(); num_tokens += page_size_) {
    pages_.at({id, Prefix(prefix, num_tokens / page_size_)}).last_use = now_;
  }
}

void NaiveCache::DropUnprotected(NamespaceId id) {
  std::erase_if(pages_, [this, id](const auto& entry) {
    return entry.first.ns == id && !IsProtected(entry.first);
  });
}

void NaiveCache::DestroyIfAbandoned(NamespaceId id) {
  const NaiveNamespace& ns = namespaces_.at(id);
  if (ns.is_draining && ns.num_handles == 0 && NumLeases(id) == 0) namespaces_.erase(id);
}

}  // namespace lora_serve

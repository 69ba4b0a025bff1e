#include "cache_comparison.h"

#include <algorithm>
#include <array>
#include <tuple>

namespace lora_serve {

// --- Accounts ----------------------------------------------------------------------------------

void CacheComparison::CompareStats() const {
  const CacheStats found = cache_.Stats();
  const CacheStats expected = model_.Stats();
  ExpectEqual(found.num_device_pages, expected.num_device_pages, "num_device_pages");
  ExpectEqual(found.num_free_pages, expected.num_free_pages, "num_free_pages");
  ExpectEqual(found.num_tree_pages, expected.num_tree_pages, "num_tree_pages");
  ExpectEqual(found.num_private_pages, expected.num_private_pages, "num_private_pages");
  ExpectEqual(found.num_evicted_pages, expected.num_evicted_pages, "num_evicted_pages");
  ExpectEqual(found.num_host_pages, expected.num_host_pages, "num_host_pages");
  ExpectEqual(found.num_free_host_pages, expected.num_free_host_pages, "num_free_host_pages");
  ExpectEqual(found.num_evicted_host_pages, expected.num_evicted_host_pages,
              "num_evicted_host_pages");
  ExpectEqual(found.num_device_state_slots, expected.num_device_state_slots,
              "num_device_state_slots");
  ExpectEqual(found.num_free_device_state_slots, expected.num_free_device_state_slots,
              "num_free_device_state_slots");
  ExpectEqual(found.num_host_state_slots, expected.num_host_state_slots, "num_host_state_slots");
  ExpectEqual(found.num_free_host_state_slots, expected.num_free_host_state_slots,
              "num_free_host_state_slots");
  ExpectEqual(found.num_transfers, expected.num_transfers, "num_transfers");
  ExpectEqual(found.num_pages_being_written_back, expected.num_pages_being_written_back,
              "num_pages_being_written_back");
  CompareNamespaceStats();
  const std::string trouble = model_.FindIdTrouble();
  if (!trouble.empty()) throw CacheDisagreement(trouble);
}

void CacheComparison::CompareNumAvailablePages() const {
  ExpectEqual(cache_.NumAvailablePages(), model_.NumAvailablePages(), "NumAvailablePages");
}

void CacheComparison::CompareNamespaceStats() const {
  const std::vector<NamespaceStats> found_list = cache_.NamespaceStatsList();
  const std::vector<NamespaceStats> expected_list = model_.NamespaceStatsList();
  ExpectEqual(found_list.size(), expected_list.size(), "number of namespaces");
  for (std::size_t index = 0; index < found_list.size(); ++index) {
    const NamespaceStats& found = found_list[index];
    const NamespaceStats& expected = expected_list[index];
    ExpectEqual(found.id, expected.id, "namespace id");
    ExpectEqual(found.is_draining, expected.is_draining, "is_draining");
    ExpectEqual(found.num_handles, expected.num_handles, "num_handles");
    ExpectEqual(found.num_leases, expected.num_leases, "num_leases");
    ExpectEqual(found.num_transfers, expected.num_transfers, "num_transfers of a namespace");
    ExpectEqual(found.num_tree_pages, expected.num_tree_pages, "num_tree_pages of a namespace");
    ExpectEqual(found.num_private_pages, expected.num_private_pages,
                "num_private_pages of a namespace");
    ExpectEqual(found.num_host_pages, expected.num_host_pages, "num_host_pages of a namespace");
    ExpectEqual(found.num_device_snapshots, expected.num_device_snapshots, "num_device_snapshots");
    ExpectEqual(found.num_host_snapshots, expected.num_host_snapshots, "num_host_snapshots");
    ExpectEqual(found.num_hit_tokens, expected.num_hit_tokens, "num_hit_tokens");
    ExpectEqual(found.num_missed_tokens, expected.num_missed_tokens, "num_missed_tokens");
    ExpectEqual(found.num_evicted_device_pages, expected.num_evicted_device_pages,
                "num_evicted_device_pages");
    ExpectEqual(found.num_evicted_host_pages, expected.num_evicted_host_pages,
                "num_evicted_host_pages of a namespace");
  }
}

void CacheComparison::CompareLease(int number, const Lease& lease) const {
  const NaiveCache::NaiveLease& expected = model_.LeaseOf(number);
  ExpectEqual(lease.pages().size(), expected.pages.size(), "number of a lease's pages");
  ExpectTrue(std::ranges::equal(lease.pages(), expected.pages), "a lease keeps its pages");
  ExpectEqual(lease.num_published_pages() * cache_.page_size(),
              static_cast<std::int32_t>(expected.published.size()), "published tokens of a lease");
  ExpectEqual(lease.num_cached_tokens(), expected.num_cached_tokens, "num_cached_tokens");
  ExpectEqual(lease.num_host_cached_tokens(), expected.num_host_cached_tokens,
              "num_host_cached_tokens");
  ExpectEqual(lease.branching_tokens(), expected.branching_tokens, "branching_tokens");
  ExpectEqual(lease.IsLoading(), expected.load_back.has_value(), "IsLoading");
  if (expected.load_back && first_transfer_id_) {
    ExpectEqual(lease.load_back_id(), IdOf(*expected.load_back), "load_back_id");
  }
  if (!expected.load_back) ExpectEqual(lease.load_back_id(), kNoTransfer, "load_back_id");
  ExpectEqual(lease.state_slot(), expected.working_slot, "state_slot");
  ExpectEqual(lease.resumed_snapshot(), model_.ResumedSlot(number), "resumed_snapshot");
}

// --- Look-ups ----------------------------------------------------------------------------------

void CacheComparison::CompareProbe(NamespaceId id, std::span<const TokenId> tokens) const {
  for (const MatchIntent intent : {MatchIntent::kPrefixReuse, MatchIntent::kRecovery}) {
    const ProbeResult found = cache_.Probe(id, tokens, intent);
    const ProbeResult expected = model_.Probe(id, tokens, intent);
    ExpectEqual(found.num_device_tokens, expected.num_device_tokens, "num_device_tokens");
    ExpectEqual(found.num_host_tokens, expected.num_host_tokens, "num_host_tokens");
    ExpectEqual(found.num_resumable_tokens, expected.num_resumable_tokens, "num_resumable_tokens");
    ExpectEqual(found.is_in_flight, expected.is_in_flight, "is_in_flight");
  }
}

void CacheComparison::CompareAllProbes() const {
  for (const Tier tier : kTiers) {
    const ResidentMap& pages = model_.pages(tier);
    for (auto page = pages.begin(); page != pages.end(); ++page) {
      const auto next = std::next(page);
      if (next != pages.end() && Continues(next->first, page->first)) continue;
      CompareProbe(page->first.ns, page->first.tokens);
    }
  }
}

void CacheComparison::CompareHints(std::span<const PrefixHint> hints) const {
  for (const PrefixHint& hint : hints) {
    const bool is_gone = !model_.HasNamespace(hint.namespace_id);
    const std::int32_t expected =
        is_gone ? 0
                : model_.Probe(hint.namespace_id, hint.tokens, MatchIntent::kPrefixReuse)
                      .num_resumable_tokens;
    ExpectEqual(hint.num_resumable_tokens, expected, "num_resumable_tokens of a hint");
  }
}

// --- Orders ------------------------------------------------------------------------------------

void CacheComparison::TakeOrders() {
  const std::vector<TransferOrder> orders = cache_.TakeTransferOrders();
  const std::int64_t num_started = model_.num_started_transfers() - num_taken_transfers_;
  ExpectEqual(orders.size(), static_cast<std::size_t>(num_started), "number of transfer orders");
  for (const TransferOrder& order : orders) {
    const std::int64_t transfer = num_taken_transfers_++;
    if (!first_transfer_id_) first_transfer_id_ = order.id.value() - transfer;
    CompareOrder(order, transfer);
    model_.LearnDestinations(transfer, order);
  }
}

void CacheComparison::CompareOrder(const TransferOrder& found, std::int64_t transfer) const {
  const TransferOrder expected = model_.OrderOf(transfer);
  ExpectEqual(found.id, IdOf(transfer), "id of a transfer");
  ExpectTrue(found.kind == expected.kind, "a transfer has the model's kind");
  ExpectEqual(found.namespace_id, expected.namespace_id, "namespace of a transfer");
  ExpectEqual(found.pages.size(), expected.pages.size(), "number of pages in an order");
  ExpectEqual(found.states.size(), expected.states.size(), "number of states in an order");
  for (std::size_t index = 0; index < found.pages.size(); ++index) {
    const auto& [source, destination] = found.pages[index];
    ExpectEqual(source, expected.pages[index].source, "source page");
    const PageId learned = expected.pages[index].destination;
    if (learned.value() != Resident::kUnknown) ExpectEqual(destination, learned, "copied to page");
  }
  for (std::size_t index = 0; index < found.states.size(); ++index) {
    const auto& [source, destination] = found.states[index];
    ExpectEqual(source, expected.states[index].source, "source slot");
    const StateSlot learned = expected.states[index].destination;
    if (learned.value() != Resident::kUnknown) ExpectEqual(destination, learned, "copied to slot");
  }
}

std::vector<std::int64_t> CacheComparison::TakenTransfers() const {
  std::vector<std::int64_t> taken;
  for (const auto& [number, transfer] : model_.transfers()) {
    if (number < num_taken_transfers_) taken.push_back(number);
  }
  return taken;
}

TransferId CacheComparison::IdOf(std::int64_t transfer) const {
  return TransferId(first_transfer_id_.value() + transfer);
}

// --- Events ------------------------------------------------------------------------------------

void CacheComparison::TakeEvents() {
  using NaiveEvent = NaiveCache::NaiveEvent;
  const auto page_size = static_cast<std::size_t>(cache_.page_size());
  std::vector<NaiveEvent> found;
  for (const KVEvent& event : cache_.TakeEvents()) {
    const bool is_stored = event.kind == KVEventKind::kStored;
    ExpectTrue(!event.page_hashes.empty(), "an event has pages");
    ExpectEqual(event.token_ids.size(), is_stored ? event.page_hashes.size() * page_size : 0,
                "number of tokens in an event");
    std::optional<std::uint64_t> parent = event.parent_hash;
    for (std::size_t page = 0; page < event.page_hashes.size(); ++page) {
      const auto tokens = std::span(event.token_ids)
                              .subspan(is_stored ? page * page_size : 0, is_stored ? page_size : 0);
      found.push_back({.kind = event.kind,
                       .tier = event.tier,
                       .ns = event.namespace_id,
                       .parent_hash = parent,
                       .hash = event.page_hashes[page],
                       .tokens = {tokens.begin(), tokens.end()}});
      parent = event.page_hashes[page];
      ListInRouter(found.back());
    }
  }
  // Which page is reported before which is not promised, but what happens to one page is.
  std::vector<NaiveEvent> expected = model_.TakeEvents();
  const auto by_page = [](const NaiveEvent& event) {
    return std::tuple(event.ns, event.tier, event.hash);
  };
  std::ranges::stable_sort(found, {}, by_page);
  std::ranges::stable_sort(expected, {}, by_page);
  ExpectEqual(found.size(), expected.size(), "number of pages in events");
  for (std::size_t index = 0; index < found.size(); ++index) {
    ExpectEqual(found[index].hash, expected[index].hash, "hash of a page in an event");
    ExpectTrue(found[index] == expected[index], "an event is the model's");
  }
}

/// A router that sees nothing but events never meets a page without its parent, or one twice.
void CacheComparison::ListInRouter(const NaiveCache::NaiveEvent& event) {
  const ListedPage page{event.ns, event.tier, event.hash};
  if (event.kind == KVEventKind::kRemoved) {
    ExpectTrue(listed_pages_.erase(page) == 1, "a page that is removed was stored");
    return;
  }
  ExpectTrue(listed_pages_.insert(page).second, "a page is stored once in a tier");
  ExpectTrue(
      !event.parent_hash || listed_pages_.contains({event.ns, event.tier, *event.parent_hash}),
      "a page is stored after its parent");
}

}  // namespace lora_serve

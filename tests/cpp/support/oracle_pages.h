#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/strong_id.h"
#include "kv_prefix_cache/cache_options.h"
#include "kv_prefix_cache/tier.h"
#include "scheduler/execution_plan.h"

namespace lora_serve::testing {

/// What stands for the KV of one token.
struct OracleEntry {
  static constexpr std::int64_t kNeverWritten = -7;
  /// What a copy leaves in its destination until it is complete, or when it has failed.
  static constexpr std::int64_t kHalfCopied = -8;

  /// Added to the id of an adapter whose staged weights could not be read: no adapter has the sum.
  static constexpr std::int64_t kGarbage = 1'000'000'000;

  std::int64_t adapter_id = kNeverWritten;
  TokenId token = -7;
  std::int32_t position = -7;
  std::uint64_t prefix_hash = 0;

  friend bool operator==(const OracleEntry&, const OracleEntry&) = default;
};

/// The pages of both tiers and the copies between them. A copy takes from its start to its end; in
/// between nobody may write its source pages, or touch its destination pages. Throws
/// std::logic_error where a real copy would read or write the wrong thing.
class OraclePages {
 public:
  OraclePages(std::int32_t page_size, std::int32_t num_device_pages, std::int32_t num_host_pages)
      : page_size_(page_size) {
    for (const Tier tier : kTiers) {
      const std::int32_t num_pages = tier == Tier::kDevice ? num_device_pages : num_host_pages;
      pages_[IndexOf(tier)].resize(static_cast<std::size_t>(num_pages));
      for (Page& page : pages_[IndexOf(tier)]) {
        page.entries.resize(static_cast<std::size_t>(page_size));
      }
    }
  }

  [[nodiscard]] const OracleEntry& Read(std::int32_t page_id, std::int32_t offset) const {
    const Page& page = pages_[IndexOf(Tier::kDevice)].at(static_cast<std::size_t>(page_id));
    Require(!page.is_destination, "a row reads device page " + std::to_string(page_id) +
                                      " before the copy to it is done");
    return page.entries.at(static_cast<std::size_t>(offset));
  }
  void Write(std::int32_t page_id, std::int32_t offset, const OracleEntry& entry) {
    Page& page = PageOf(Tier::kDevice, page_id);
    Require(!page.is_destination && page.num_readers == 0,
            "a row writes device page " + std::to_string(page_id) + " while it is copied");
    page.entries.at(static_cast<std::size_t>(offset)) = entry;
  }

  /// Throws when a row that is planned now must not read, or write, the page.
  void CheckMayTouch(std::int32_t page_id, bool writes) const {
    const Page& page = pages_[IndexOf(Tier::kDevice)].at(static_cast<std::size_t>(page_id));
    Require(!page.is_destination && !(writes && page.num_readers > 0),
            "a row is planned on device page " + std::to_string(page_id) + " while it is copied");
  }

  /// Starts the plan's copies.
  void Start(const ExecutionPlan& plan) {
    Require(plan.transfer_offsets.size() == plan.transfer_ids.size() + 1,
            "transfer_offsets has a wrong length");
    for (std::size_t index = 0; index < plan.transfer_ids.size(); ++index) {
      Copy copy;
      copy.plan_id = plan.plan_id;
      copy.source_tier = plan.transfer_kinds.at(index) == 0 ? Tier::kDevice : Tier::kHost;
      copy.destination_tier = copy.source_tier == Tier::kDevice ? Tier::kHost : Tier::kDevice;
      for (auto pair = plan.transfer_offsets[index]; pair < plan.transfer_offsets[index + 1];
           ++pair) {
        const auto at = static_cast<std::size_t>(pair);
        copy.sources.push_back(plan.transfer_source_pages.at(at));
        copy.destinations.push_back(plan.transfer_destination_pages.at(at));
        StartPage(copy);
      }
      Require(!copy.sources.empty(), "a copy of no page");
      Require(copies_.emplace(plan.transfer_ids[index], std::move(copy)).second,
              "copy " + std::to_string(plan.transfer_ids[index]) + " is under way already");
    }
  }

  /// Ends a copy; one that has failed leaves something half written.
  void End(std::int64_t id, bool has_failed) {
    const auto it = copies_.find(id);
    Require(it != copies_.end(), "copy " + std::to_string(id) + " is not under way");
    const Copy& copy = it->second;
    for (std::size_t index = 0; index < copy.sources.size(); ++index) {
      Page& source = PageOf(copy.source_tier, copy.sources[index]);
      Page& destination = PageOf(copy.destination_tier, copy.destinations[index]);
      Require(source.entries == copy.contents[index], "a source page changed while it was copied");
      --source.num_readers;
      destination.is_destination = false;
      if (!has_failed) destination.entries = copy.contents[index];
    }
    copies_.erase(it);
  }

  /// Ids of the copies under way of plans up to `newest_plan_id`, lowest first.
  [[nodiscard]] std::vector<std::int64_t> UnderWay(std::int64_t newest_plan_id) const {
    std::vector<std::int64_t> ids;
    for (const auto& [id, copy] : copies_) {
      if (copy.plan_id <= newest_plan_id) ids.push_back(id);
    }
    return ids;
  }

  /// Requires: it is under way.
  [[nodiscard]] TransferKind KindOf(std::int64_t id) const {
    return copies_.at(id).source_tier == Tier::kDevice ? TransferKind::kWriteBack
                                                       : TransferKind::kLoadBack;
  }

 private:
  struct Page {
    std::vector<OracleEntry> entries;
    std::int32_t num_readers = 0;  // copies under way from it
    bool is_destination = false;   // of a copy under way
  };
  struct Copy {
    std::int64_t plan_id = -1;
    Tier source_tier = Tier::kDevice;
    Tier destination_tier = Tier::kHost;
    std::vector<std::int32_t> sources;
    std::vector<std::int32_t> destinations;
    std::vector<std::vector<OracleEntry>> contents;  // of the source pages when it started
  };

  static void Require(bool condition, const std::string& message) {
    if (!condition) throw std::logic_error("oracle executor: " + message);
  }
  Page& PageOf(Tier tier, std::int32_t page_id) {
    return pages_[IndexOf(tier)].at(static_cast<std::size_t>(page_id));
  }

  /// Starts the newest pair of `copy`.
  void StartPage(Copy& copy) {
    Page& source = PageOf(copy.source_tier, copy.sources.back());
    Page& destination = PageOf(copy.destination_tier, copy.destinations.back());
    Require(!source.is_destination, "a copy reads what another copy writes");
    Require(!destination.is_destination && destination.num_readers == 0,
            "a copy writes what another copy touches");
    CheckIsWholePage(source);
    ++source.num_readers;
    destination.is_destination = true;
    copy.contents.push_back(source.entries);
    destination.entries.assign(destination.entries.size(),
                               {.adapter_id = OracleEntry::kHalfCopied});
  }

  void CheckIsWholePage(const Page& page) const {
    const OracleEntry& first = page.entries.front();
    Require(first.adapter_id >= 0 && first.position % page_size_ == 0,
            "a copy of a page that was never written");
    for (std::int32_t offset = 0; offset < page_size_; ++offset) {
      const OracleEntry& entry = page.entries.at(static_cast<std::size_t>(offset));
      // Weights may have broken in the middle of a page; nobody will read it.
      Require(
          entry.adapter_id % OracleEntry::kGarbage == first.adapter_id % OracleEntry::kGarbage &&
              entry.position == first.position + offset,
          "a copy of a page that is not full");
    }
  }

  std::int32_t page_size_;
  std::array<std::vector<Page>, kNumTiers> pages_;
  std::map<std::int64_t, Copy> copies_;
};

}  // namespace lora_serve::testing

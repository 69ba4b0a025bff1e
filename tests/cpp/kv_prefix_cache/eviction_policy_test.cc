#include "kv_prefix_cache/eviction_policy.h"

#include <gtest/gtest.h>

#include <vector>

#include "cache_scenario.h"
#include "common/errors.h"
#include "kv_prefix_cache/namespace.h"
#include "kv_prefix_cache/page_pool.h"

namespace lora_serve {
namespace {

constexpr std::int32_t kPageSize = 1;

class EvictionPolicyTest : public testing::Test {
 protected:
  Node& Add(Node& parent, TokenId first, std::int32_t num_pages, Epoch epoch) {
    Node& node =
        parent.namespace_backptr->tree().AddChild(parent, Sequence(first, num_pages * kPageSize));
    node.On(Tier::kDevice).pages = pool_.Allocate(num_pages);
    node.On(Tier::kDevice).epoch = epoch;
    policy_.Unlist(parent);
    ++parent.On(Tier::kDevice).num_continuations;
    policy_.Refresh(parent);
    policy_.Refresh(node);
    return node;
  }
  void Remove(Node& leaf) {
    Node& parent = *leaf.parent_backptr;
    policy_.Unlist(leaf);
    policy_.Forget(leaf);
    leaf.namespace_backptr->tree().RemoveLeaf(leaf);
    policy_.Unlist(parent);
    --parent.On(Tier::kDevice).num_continuations;
    policy_.Refresh(parent);
  }
  /// As a completed write-back of the first pages would.
  void PutOnHost(Node& node, std::int32_t num_pages) {
    policy_.Unlist(node);
    node.On(Tier::kHost).pages = host_pool_.Allocate(num_pages);
    policy_.Refresh(node);
  }
  std::vector<Node*> Order() {
    std::vector<Node*> order;
    policy_.ForEachVictim([&order](Node& node) {
      order.push_back(&node);
      return true;
    });
    return order;
  }
  void TearDown() override {
    policy_.CheckInvariants();
    while (Node* const leaf = policy_.Victim()) Remove(*leaf);
    EXPECT_EQ(policy_.num_listed_pages(), 0);
  }

  PagePool pool_{64};
  PagePool host_pool_{64};

  EvictionPolicy policy_{Component::kFullAttention, Tier::kDevice};
  NodeSequencer sequencer_;
  Namespace first_{NamespaceId{0}, {}, kPageSize, &sequencer_, nullptr};
  Namespace second_{NamespaceId{1}, {}, kPageSize, &sequencer_, nullptr};
  Node& root_ = first_.tree().root();
  Node& second_root_ = second_.tree().root();
};

TEST_F(EvictionPolicyTest, HasNoVictimAtFirstAndNeverListsARoot) {
  EXPECT_EQ(policy_.Victim(), nullptr);
  policy_.Refresh(root_);
  EXPECT_EQ(policy_.Victim(), nullptr);
  policy_.Pin(root_);
  policy_.Unpin(root_);
  EXPECT_EQ(policy_.Victim(), nullptr);
}

TEST_F(EvictionPolicyTest, TakesTheOldestLeafOfAllNamespaces) {
  Node& newest = Add(root_, 0, 1, 30);
  Node& oldest = Add(second_root_, 0, 1, 10);
  Node& middle = Add(root_, 1, 1, 20);
  EXPECT_EQ(policy_.Victim(), &oldest);
  Remove(oldest);
  EXPECT_EQ(policy_.Victim(), &middle);
  Remove(middle);
  EXPECT_EQ(policy_.Victim(), &newest);
}

TEST_F(EvictionPolicyTest, BreaksTiesByOrderOfCreation) {
  Node& first = Add(second_root_, 0, 1, 5);
  Add(root_, 0, 1, 5);
  Add(second_root_, 1, 1, 5);
  EXPECT_EQ(policy_.Victim(), &first);
}

TEST_F(EvictionPolicyTest, VictimOfLooksAtOneNamespaceOnly) {
  Add(root_, 0, 1, 1);
  Node& leaf = Add(second_root_, 0, 1, 2);
  EXPECT_EQ(policy_.VictimOf(second_), &leaf);
}

TEST_F(EvictionPolicyTest, ListsAParentOnlyAfterItsLastChild) {
  Node& parent = Add(root_, 0, 2, 1);
  Node& child = Add(parent, 10, 1, 2);
  Node& sibling = Add(parent, 20, 1, 3);
  EXPECT_EQ(policy_.Victim(), &child);
  Remove(child);
  EXPECT_EQ(policy_.Victim(), &sibling);
  Remove(sibling);
  EXPECT_EQ(policy_.Victim(), &parent);
}

TEST_F(EvictionPolicyTest, InOneAgeBucketTheClassDecidesAcrossBucketsTheAge) {
  Node& unbacked = Add(root_, 0, 1, 1);
  Node& backed = Add(root_, 1, 1, 2);
  Node& next_bucket = Add(root_, 2, 1, kAgeBucketEpochs);
  PutOnHost(backed, 1);
  PutOnHost(next_bucket, 1);
  EXPECT_EQ(Order(), (std::vector<Node*>{&backed, &unbacked, &next_bucket}));
  Node& absent = Add(second_root_, 0, 1, 3);
  second_.set_is_adapter_resident(false);
  policy_.RerankNamespace(second_);
  EXPECT_EQ(Order(), (std::vector<Node*>{&absent, &backed, &unbacked, &next_bucket}));
  EXPECT_EQ(policy_.Victim(), &absent);
}

TEST_F(EvictionPolicyTest, ANamespaceOverItsQuotaGoesFirstHoweverYoung) {
  Add(root_, 0, 1, 1);
  Node& young = Add(second_root_, 0, 3, 1000);
  second_.counts().tree_pages[IndexOf(Tier::kDevice)] = 3;
  second_.set_quota(Tier::kDevice, 1);
  policy_.RerankNamespace(second_);
  EXPECT_EQ(policy_.Victim(), &young);
  EXPECT_EQ(policy_.NumVictimPages(young), 2);  // then it keeps its quota
  second_.set_quota(Tier::kDevice, std::nullopt);
  policy_.RerankNamespace(second_);
  EXPECT_NE(policy_.Victim(), &young);
  EXPECT_EQ(policy_.NumVictimPages(young), 3);
}

TEST_F(EvictionPolicyTest, OfAPartlyBackedLeafTheUnbackedTailGoesFirst) {
  Node& leaf = Add(root_, 0, 5, 1);
  PutOnHost(leaf, 2);
  EXPECT_EQ(policy_.NumVictimPages(leaf), 3);
}

TEST_F(EvictionPolicyTest, PagesInFlightAreNotListed) {
  Node& leaf = Add(root_, 0, 2, 1);
  policy_.Unlist(leaf);
  leaf.On(Tier::kDevice).num_in_flight = 1;
  policy_.Refresh(leaf);
  EXPECT_EQ(policy_.Victim(), nullptr);
  leaf.On(Tier::kDevice).num_in_flight = 0;
  policy_.Refresh(leaf);
  EXPECT_EQ(policy_.Victim(), &leaf);
}

TEST_F(EvictionPolicyTest, APinTakesALeafOffAndTheLastUnpinBringsItBack) {
  Node& leaf = Add(root_, 0, 3, 1);
  EXPECT_EQ(policy_.num_listed_pages(), 3);
  policy_.Pin(leaf);
  policy_.Pin(leaf);
  EXPECT_EQ(policy_.Victim(), nullptr);
  EXPECT_EQ(policy_.num_listed_pages(), 0);
  policy_.Unpin(leaf);
  EXPECT_EQ(policy_.Victim(), nullptr);
  leaf.On(Tier::kDevice).epoch = 8;
  policy_.Unpin(leaf);
  EXPECT_EQ(policy_.Victim(), &leaf);
  EXPECT_EQ(policy_.num_listed_pages(), 3);
}

TEST_F(EvictionPolicyTest, UnpinningAnInnerNodeDoesNotListIt) {
  Node& parent = Add(root_, 0, 1, 1);
  policy_.Pin(parent);
  Node& child = Add(parent, 10, 1, 2);
  policy_.Unpin(parent);
  EXPECT_EQ(policy_.Victim(), &child);
  EXPECT_EQ(policy_.num_listed_pages(), 1);
}

TEST_F(EvictionPolicyTest, CountsEveryProtectedPageOnce) {
  Node& parent = Add(root_, 0, 4, 1);
  Node& left = Add(parent, 10, 2, 2);
  Node& right = Add(parent, 20, 3, 3);
  Add(right, 30, 5, 4);
  EXPECT_EQ(policy_.CountProtectedPages(), 0);
  policy_.Pin(left);
  EXPECT_EQ(policy_.CountProtectedPages(), 6);
  policy_.Pin(right);
  policy_.Pin(right);
  policy_.Pin(parent);
  policy_.Pin(second_root_);
  EXPECT_EQ(policy_.CountProtectedPages(), 9);
  policy_.Unpin(right);
  policy_.Unpin(parent);
  EXPECT_EQ(policy_.CountProtectedPages(), 9);
  policy_.Unpin(right);
  EXPECT_EQ(policy_.CountProtectedPages(), 6);
  policy_.Unpin(left);
  policy_.Unpin(second_root_);
  EXPECT_EQ(policy_.CountProtectedPages(), 0);
}

TEST_F(EvictionPolicyTest, CountsWhatAPinInsideAnEdgeWouldProtect) {
  Node& parent = Add(root_, 0, 4, 1);
  Node& leaf = Add(parent, 10, 3, 2);
  EXPECT_EQ(policy_.CountProtectedPages({.node = &leaf, .num_edge_pages = 1}), 5);
  EXPECT_EQ(policy_.CountProtectedPages({.node = &root_, .num_edge_pages = 0}), 0);
  policy_.Pin(leaf);
  EXPECT_EQ(policy_.CountProtectedPages({.node = &leaf, .num_edge_pages = 1}), 7);
  EXPECT_EQ(policy_.CountProtectedPages({.node = &parent, .num_edge_pages = 2}), 7);
  policy_.Unpin(leaf);
}

TEST_F(EvictionPolicyTest, PinsAreForgottenInAnyOrder) {
  std::vector<Node*> leaves;
  for (TokenId token = 0; token < 5; ++token) leaves.push_back(&Add(root_, token, 1, token));
  for (Node* const leaf : leaves) policy_.Pin(*leaf);
  for (const std::size_t index : {2u, 0u, 4u, 1u, 3u}) {
    policy_.Unpin(*leaves[index]);
    policy_.CheckInvariants();
  }
  EXPECT_EQ(policy_.CountProtectedPages(), 0);
  EXPECT_EQ(policy_.num_listed_pages(), 5);
}

TEST_F(EvictionPolicyTest, CheckInvariantsNoticesAnEpochChangedBehindItsBack) {
  Node& leaf = Add(root_, 0, 1, 1);
  leaf.On(Tier::kDevice).epoch = 2;
  EXPECT_THROW(policy_.CheckInvariants(), InternalError);  // E2
  leaf.On(Tier::kDevice).epoch = 1;
}

TEST_F(EvictionPolicyTest, CheckInvariantsNoticesAPinThatWentAround) {
  Node& leaf = Add(root_, 0, 1, 1);
  policy_.Pin(leaf);
  leaf.On(Tier::kDevice).num_pins = 0;
  EXPECT_THROW(policy_.CheckInvariants(), InternalError);  // E4
  leaf.On(Tier::kDevice).num_pins = 1;
  policy_.Unpin(leaf);
}

using EvictionPolicyDeathTest = EvictionPolicyTest;

TEST_F(EvictionPolicyDeathTest, AnUnbalancedUnpinIsFatal) {
  Node& leaf = Add(root_, 0, 1, 1);
  EXPECT_DEATH(policy_.Unpin(leaf), "unbalanced unpin of node");
}

}  // namespace
}  // namespace lora_serve

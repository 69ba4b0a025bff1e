#include "kv_prefix_cache/child_map.h"

#include <gtest/gtest.h>

#include <array>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "common/errors.h"
#include "kv_prefix_cache/node.h"

namespace lora_serve {
namespace {

constexpr std::size_t kPageSize = 2;

std::unique_ptr<Node> NodeWith(std::vector<TokenId> tokens) {
  auto node = std::make_unique<Node>();
  node->num_pages = static_cast<std::int32_t>(tokens.size() / kPageSize);
  node->tokens = std::move(tokens);
  return node;
}

Node* Find(const ChildMap& children, TokenId first, TokenId second) {
  return children.Find(std::array{first, second});
}

TEST(ChildMapTest, FindsNothingWhenEmpty) {
  const ChildMap children;
  EXPECT_TRUE(children.IsEmpty());
  EXPECT_EQ(Find(children, 1, 2), nullptr);
}

TEST(ChildMapTest, ComparesTheWholePageOfAnOnlyChild) {
  ChildMap children;
  auto node = NodeWith({1, 2, 3, 4});
  Node* const expected = node.get();
  children.Insert(std::move(node), kPageSize);
  EXPECT_EQ(Find(children, 1, 2), expected);
  EXPECT_EQ(Find(children, 1, 3), nullptr);
  EXPECT_EQ(Find(children, 2, 1), nullptr);
}

TEST(ChildMapTest, FindsEachOfManyByItsFirstPage) {
  ChildMap children;
  std::vector<Node*> expected;
  for (TokenId token = 0; token < 1000; ++token) {
    auto node = NodeWith({token / 32, token % 32});
    expected.push_back(node.get());
    children.Insert(std::move(node), kPageSize);
  }
  for (TokenId token = 0; token < 1000; ++token) {
    ASSERT_EQ(Find(children, token / 32, token % 32), expected[static_cast<std::size_t>(token)]);
  }
  EXPECT_EQ(Find(children, 32, 0), nullptr);
  EXPECT_EQ(children.size(), 1000u);
}

TEST(ChildMapTest, RemoveGivesBackTheChildAndForgetsIt) {
  ChildMap children;
  auto node = NodeWith({1, 2});
  Node* const expected = node.get();
  children.Insert(std::move(node), kPageSize);
  children.Insert(NodeWith({3, 4}), kPageSize);
  const auto removed = children.Remove(*expected, kPageSize);
  EXPECT_EQ(removed.get(), expected);
  EXPECT_EQ(Find(children, 1, 2), nullptr);
  EXPECT_NE(Find(children, 3, 4), nullptr);
  EXPECT_THROW((void)children.Remove(*expected, kPageSize), InternalError);
}

TEST(ChildMapTest, ReplacePutsAnotherNodeBehindTheSamePage) {
  ChildMap children;
  auto node = NodeWith({1, 2, 3, 4});
  Node* const old_node = node.get();
  children.Insert(std::move(node), kPageSize);
  auto replacement = NodeWith({1, 2});
  Node* const new_node = replacement.get();
  const auto replaced = children.Replace(*old_node, std::move(replacement), kPageSize);
  EXPECT_EQ(replaced.get(), old_node);
  EXPECT_EQ(Find(children, 1, 2), new_node);
  EXPECT_EQ(children.size(), 1u);
}

TEST(ChildMapTest, EqualsAnOrderedMapWhileChildrenComeAndGo) {
  ChildMap children;
  std::map<TokenId, Node*> expected;
  std::mt19937 random(3);
  const auto draw = [&random](int end) {
    return std::uniform_int_distribution<int>(0, end - 1)(random);
  };
  for (int step = 0; step < 40'000; ++step) {
    // Grows to some hundreds and shrinks to nothing again, several times.
    const bool is_growing = step / 4'000 % 2 == 0;
    const TokenId token = draw(600);
    const auto it = expected.find(token);
    if (it == expected.end() && draw(10) < (is_growing ? 9 : 1)) {
      auto node = NodeWith({token, 7});
      expected.emplace(token, node.get());
      children.Insert(std::move(node), kPageSize);
    } else if (it != expected.end() && draw(10) < (is_growing ? 2 : 9)) {
      ASSERT_EQ(children.Remove(*it->second, kPageSize).get(), it->second);
      expected.erase(it);
    } else if (it != expected.end()) {
      auto node = NodeWith({token, 7, 8, 9});
      Node* const replacement = node.get();
      ASSERT_EQ(children.Replace(*it->second, std::move(node), kPageSize).get(), it->second);
      it->second = replacement;
    }
    ASSERT_EQ(children.size(), expected.size());
    const TokenId probed = draw(600);
    const auto found = expected.find(probed);
    ASSERT_EQ(Find(children, probed, 7), found == expected.end() ? nullptr : found->second);
    if (step % 100 != 0) continue;
    for (const auto& [key, node] : expected) ASSERT_EQ(Find(children, key, 7), node);
    std::set<const Node*> visited;
    children.ForEach([&visited](const Node& node) { visited.insert(&node); });
    ASSERT_EQ(visited.size(), expected.size());
  }
}

TEST(HashPageTest, DependsOnEveryTokenAndItsPlace) {
  std::set<std::uint64_t> hashes;
  std::size_t num_pages = 0;
  for (TokenId a = 0; a < 8; ++a) {
    for (TokenId b = 0; b < 8; ++b) {
      for (TokenId c = 0; c < 8; ++c, ++num_pages) hashes.insert(HashPage(std::array{a, b, c}));
    }
  }
  EXPECT_EQ(hashes.size(), num_pages);
}

}  // namespace
}  // namespace lora_serve

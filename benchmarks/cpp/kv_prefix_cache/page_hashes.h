#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "common/strong_id.h"
#include "kv_prefix_cache/event_log.h"

#ifdef LORA_SERVE_BENCH_HAS_LIBCRYPTO
// The plain functions are deprecated for new code, but they are the fastest way into libcrypto: no
// look-up of an algorithm and no context on the heap for every page.
#define OPENSSL_SUPPRESS_DEPRECATED
#include <openssl/sha.h>

#include <array>
#endif

// The hashes that PageHashMap is measured with.

namespace lora_serve::bench {

/// The core's own 64-bit chain, which it uses for events. Fast, and two different prompts may have
/// the same hash: a cache that trusts it can serve one user another user's pages.
struct Chain64 {
  using Digest = std::uint64_t;
  [[nodiscard]] static Digest First() { return 0; }
  [[nodiscard]] static Digest Next(Digest parent, std::span<const TokenId> page) {
    return ChainHash(parent, page);
  }
};

/// A page's words multiplied in independent pairs, then folded into the parent's hash: about as
/// fast as hashing gets, because only the last step waits for the parent. As little to be trusted.
struct Wide64 {
  using Digest = std::uint64_t;
  [[nodiscard]] static Digest First() { return 0; }
  /// Requires: whole groups of four tokens.
  [[nodiscard]] static Digest Next(Digest parent, std::span<const TokenId> page) {
    std::uint64_t mixed = 0;
    std::uint64_t salt = kSalt;
    for (std::size_t i = 0; i < page.size(); i += 4) {
      std::uint64_t words[2];
      std::memcpy(words, page.data() + i, sizeof(words));
      mixed ^= MultiplyFold(words[0] ^ salt, words[1] ^ ~salt);
      salt += kSalt;
    }
    return MultiplyFold(mixed ^ parent, kSalt);
  }

 private:
  static constexpr std::uint64_t kSalt = 0x9e3779b97f4a7c15;
  __extension__ using Wide = unsigned __int128;
  [[nodiscard]] static std::uint64_t MultiplyFold(std::uint64_t a, std::uint64_t b) {
    const Wide product = Wide{a} * b;
    return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
  }
};

struct Bucket64 {
  std::size_t operator()(std::uint64_t digest) const noexcept {
    return static_cast<std::size_t>(digest);
  }
};

#ifdef LORA_SERVE_BENCH_HAS_LIBCRYPTO

/// SHA-256 over the parent's digest and the page's tokens, as systems hash that must not confuse
/// two prompts.
struct Sha256 {
  using Digest = std::array<unsigned char, SHA256_DIGEST_LENGTH>;
  [[nodiscard]] static Digest First() { return {}; }
  [[nodiscard]] static Digest Next(const Digest& parent, std::span<const TokenId> page) {
    SHA256_CTX context;
    SHA256_Init(&context);
    SHA256_Update(&context, parent.data(), parent.size());
    SHA256_Update(&context, page.data(), page.size_bytes());
    Digest digest;
    SHA256_Final(digest.data(), &context);
    return digest;
  }
};

struct Sha256Bucket {
  std::size_t operator()(const Sha256::Digest& digest) const noexcept {
    std::size_t bucket = 0;
    std::memcpy(&bucket, digest.data(), sizeof(bucket));
    return bucket;
  }
};

#endif

}  // namespace lora_serve::bench

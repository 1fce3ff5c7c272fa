// Grouped LoRA over paged rows on the CPU. For every segment (adapter with rank R) and slice s of one part:
//   h[s, token, r] = sum_k x[token, k] * A_s[r, k]                  shrink
//   y[token, out_start_s + n] += sum_r h[s, token, r] * B_s[r, n]   expand
// Columns p * piece_elems and on of row r of A_s lie at kv + table[s][0][p][r], of B_s (transposed) at
// kv + table[s][1][p][r]; -1 = zero rows, always last.
// Sums are in float. The work is cut into items of a few rows or columns, so that both one adapter with many tokens and
// many adapters with one token use every thread. Decode is bound by reading
// weights: each is read once per TOKENS tokens, and prefetched, as rows are too short for the hardware to see a pattern.
//
// Plain C interface and no headers but the compiler's own: it is loaded with ctypes. OpenMP symbols are left open, so that
// they resolve to the runtime torch has loaded, with its threads and their pinning.

#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int TOKENS = 16;         // Tokens of one work item.
constexpr int ROWS = 32;           // Rank rows of a shrink item.
constexpr int COLUMNS = 1024;      // Output columns of an expand item.
constexpr int GROUPS_PER_THREAD = 8;
constexpr int NUM_COUNTS = 8;      // The regions of the metadata are those of batch.py.
constexpr int64_t SERIAL_PRODUCTS = 131072;  // Below so many multiplications, waking threads costs more than it saves.

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

inline float as_float(uint32_t bits) { float f; std::memcpy(&f, &bits, 4); return f; }
inline uint32_t as_bits(float f) { uint32_t bits; std::memcpy(&bits, &f, 4); return bits; }

inline float widen(float v) { return v; }
inline float widen(BFloat16 v) { return as_float(uint32_t(v.bits) << 16); }
inline float widen(Float16 v) {
  uint32_t sign = uint32_t(v.bits & 0x8000) << 16, rest = v.bits & 0x7fff;
  if (rest >= 0x7c00) return as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  return as_float(sign | as_bits(as_float(rest << 13) * as_float(0x77800000)));  // 2^112 rebases the exponent.
}

inline void narrow(float f, float* out) { *out = f; }
inline void narrow(float f, BFloat16* out) {
  uint32_t bits = as_bits(f);
  out->bits = f != f ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // Round to nearest, ties to even.
}
inline void narrow(float f, Float16* out) {
  uint32_t sign = (as_bits(f) >> 16) & 0x8000, bits = as_bits(f) & 0x7fffffff;
  if (f != f) out->bits = 0x7e00;
  else if (bits >= 0x477ff000) out->bits = sign | 0x7c00;  // 65520 and above round to infinity.
  else if (bits < 0x38800000) out->bits = sign | (as_bits(as_float(bits) + 0.5f) - 0x3f000000);  // Subnormal.
  else out->bits = sign | ((bits + 0xfff + ((bits >> 13) & 1) - 0x38000000) >> 13);
}

inline Floats load(const float* p) { Floats v; std::memcpy(&v, p, sizeof v); return v; }
// Where the compiler's own conversion between 16 and 32 bits takes five instructions, intrinsics take one.
inline Words widen_bits(const BFloat16* p) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  Halves halves;
  std::memcpy(&halves, p, sizeof halves);
  return __builtin_convertvector(halves, Words);
#endif
}
inline void store_bits(BFloat16* p, Words words) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)words));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)words, (__m256i)words);  // Each half's four words, twice.
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  Halves halves = __builtin_convertvector(words, Halves);
  std::memcpy(p, &halves, sizeof halves);
#endif
}
inline Floats load(const BFloat16* p) { return (Floats)(widen_bits(p) << 16); }
inline Floats load(const Float16* p) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  Floats v;
  for (int i = 0; i < LANES; ++i) v[i] = widen(p[i]);
  return v;
#endif
}

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
inline void store(BFloat16* p, Floats v) {
  Words words = (Words)v;
  words = (words + 0x7fff + ((words >> 16) & 1)) >> 16;
  words = (v == v) ? words : Words{} + 0x7fc0;
  store_bits(p, words);
}
inline void store(Float16* p, Floats v) { for (int i = 0; i < LANES; ++i) narrow(v[i], p + i); }

// Sum of the lanes, by halves: lane after lane, it would cost as much as the dot product of a short row.
typedef float Floats4 __attribute__((vector_size(16)));
typedef float Floats8 __attribute__((vector_size(32)));
typedef float Floats16 __attribute__((vector_size(64)));
template <class Half, class Whole>
inline Half fold(const Whole& v) {
  Half halves[2];
  std::memcpy(halves, &v, sizeof halves);
  return halves[0] + halves[1];
}
inline float sum(const Floats4& v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline float sum(const Floats8& v) { return sum(fold<Floats4>(v)); }
inline float sum(const Floats16& v) { return sum(fold<Floats8>(v)); }

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <int N> struct Count { enum { value = N }; };

struct Part { int64_t first_slice, num_slices, in_features, piece_elems, num_pieces; const int64_t* widths; };

struct Batch {
  int64_t num_segments;
  const int64_t *table, *rank, *start, *len, *tokens;
  Batch(const int64_t* meta, int64_t max_adapters)
      : num_segments(meta[0]), table(meta + NUM_COUNTS), rank(table + max_adapters), start(rank + max_adapters),
        len(start + max_adapters), tokens(len + max_adapters) {}
  const int64_t* rows(int64_t segment, int64_t slice, int side, int64_t piece, int64_t num_pieces) const {
    return reinterpret_cast<const int64_t*>(table[segment]) + ((2 * slice + side) * num_pieces + piece) * rank[segment];
  }
};

struct Hidden { float* data; int64_t slice_stride, token_stride; };

// `first` and `count`: rank rows of a shrink item, output columns of an expand item. `out_start`: the slice's first column.
struct Item { int64_t segment, slice, first, count, token, num_tokens, rank, out_start; };

int64_t stored_rows(const int64_t* offsets, int64_t rank) {
  while (rank > 0 && offsets[rank - 1] < 0) --rank;
  return rank;
}

template <int NT, int NR, class X, class W>
inline void dot_block(const X* const* x, const W* const* a, const W* const* ahead, int64_t n, float (*out)[NR]) {
  Floats acc[NT][NR] = {};
  int64_t k = 0;
  for (; k + LANES <= n; k += LANES) {
    Floats xs[NT];
    for (int t = 0; t < NT; ++t) xs[t] = load(x[t] + k);
    for (int r = 0; r < NR; ++r) {
      Floats weights = load(a[r] + k);
      if (NT == 1) __builtin_prefetch(ahead[r] + k);
      for (int t = 0; t < NT; ++t) acc[t][r] += xs[t] * weights;
    }
  }
  for (int t = 0; t < NT; ++t)
    for (int r = 0; r < NR; ++r) {
      float total = sum(acc[t][r]);
      for (int64_t j = k; j < n; ++j) total += widen(x[t][j]) * widen(a[r][j]);
      out[t][r] = total;
    }
}

template <int NR, class X, class W>
void shrink_rows(const X* x, int64_t x_stride, const int64_t* tokens, int64_t num_tokens, const W* const* a,
                 const W* const* ahead, int64_t n, bool first_piece, Hidden h, float* h_slice, int64_t row) {
  int64_t i = 0;
  auto block = [&](auto count) {
    constexpr int NT = decltype(count)::value;
    for (; i + NT <= num_tokens; i += NT) {
      const X* xs[NT];
      float out[NT][NR];
      for (int t = 0; t < NT; ++t) xs[t] = x + tokens[i + t] * x_stride;
      dot_block<NT, NR>(xs, a, ahead, n, out);
      for (int t = 0; t < NT; ++t) {
        float* target = h_slice + tokens[i + t] * h.token_stride + row;
        for (int r = 0; r < NR; ++r) target[r] = first_piece ? out[t][r] : target[r] + out[t][r];
      }
    }
  };
  block(Count<4>{});
  block(Count<1>{});
}

template <class X, class W>
void shrink_item(const Item& item, const Batch& batch, const Part& part, const X* x, int64_t x_stride, const W* kv,
                 Hidden h) {
  const int64_t* tokens = batch.tokens + item.token;
  float* h_slice = h.data + item.slice * h.slice_stride;
  for (int64_t piece = 0, column = 0; column < part.in_features; ++piece, column += part.piece_elems) {
    const int64_t* offsets = batch.rows(item.segment, part.first_slice + item.slice, 0, piece, part.num_pieces);
    const int64_t n = least(part.piece_elems, part.in_features - column);
    int64_t r = item.first, end = item.first + item.count;
    auto rows = [&](auto count) {
      constexpr int NR = decltype(count)::value;
      for (; r + NR <= end; r += NR) {
        const W *a[NR], *ahead[NR];
        for (int i = 0; i < NR; ++i) {
          a[i] = kv + offsets[r + i];
          ahead[i] = kv + offsets[least(r + i + 2 * NR, item.rank - 1)];
        }
        shrink_rows<NR>(x + column, x_stride, tokens, item.num_tokens, a, ahead, n, piece == 0, h, h_slice, r);
      }
    };
    rows(Count<4>{});
    rows(Count<1>{});
  }
}

// acc[t][c] += sum_i scale[t][i] * b[i][c]
template <int NT, int NR, class W>
inline void add_rows(const W* const* b, const W* const* ahead, const float (*scale)[NR], int64_t n, float (*acc)[COLUMNS]) {
  int64_t c = 0;
  for (; c + LANES <= n; c += LANES) {
    Floats sums[NT];
    for (int t = 0; t < NT; ++t) sums[t] = load(acc[t] + c);
    for (int i = 0; i < NR; ++i) {
      Floats weights = load(b[i] + c);
      if (NT == 1) __builtin_prefetch(ahead[i] + c);
      for (int t = 0; t < NT; ++t) sums[t] += scale[t][i] * weights;
    }
    for (int t = 0; t < NT; ++t) store(acc[t] + c, sums[t]);
  }
  for (; c < n; ++c)
    for (int t = 0; t < NT; ++t)
      for (int i = 0; i < NR; ++i) acc[t][c] += scale[t][i] * widen(b[i][c]);
}

template <int NT, class X, class W>
void expand_tokens(const int64_t* tokens, const int64_t* offsets, int64_t column, const Item& item, const W* kv,
                   Hidden h, X* y, int64_t y_stride) {
  constexpr int NR = 4;
  alignas(64) float acc[NT][COLUMNS];
  const float* hidden[NT];
  for (int t = 0; t < NT; ++t) {
    std::memset(acc[t], 0, item.count * sizeof(float));
    hidden[t] = h.data + item.slice * h.slice_stride + tokens[t] * h.token_stride;
  }
  auto add = [&](auto count, int64_t row) {
    constexpr int N = decltype(count)::value;
    const W *b[N], *ahead[N];
    float scale[NT][N];
    for (int i = 0; i < N; ++i) {
      b[i] = kv + offsets[row + i] + column;
      ahead[i] = kv + offsets[least(row + i + 2 * N, item.rank - 1)] + column;
      for (int t = 0; t < NT; ++t) scale[t][i] = hidden[t][row + i];
    }
    add_rows<NT, N>(b, ahead, scale, item.count, acc);
  };
  int64_t r = 0;
  for (; r + NR <= item.rank; r += NR) add(Count<NR>{}, r);
  for (; r < item.rank; ++r) add(Count<1>{}, r);
  for (int t = 0; t < NT; ++t) {
    X* out = y + tokens[t] * y_stride + item.out_start + item.first;
    int64_t c = 0;
    for (; c + LANES <= item.count; c += LANES) store(out + c, load(out + c) + load(acc[t] + c));
    for (; c < item.count; ++c) narrow(widen(out[c]) + acc[t][c], out + c);
  }
}

template <class X, class W>
void expand_item(const Item& item, const Batch& batch, const Part& part, const W* kv, Hidden h, X* y, int64_t y_stride) {
  const int64_t piece = item.first / part.piece_elems, column = item.first % part.piece_elems;
  const int64_t* offsets = batch.rows(item.segment, part.first_slice + item.slice, 1, piece, part.num_pieces);
  const int64_t* tokens = batch.tokens + item.token;
  int64_t i = 0;
  for (; i + 4 <= item.num_tokens; i += 4) expand_tokens<4>(tokens + i, offsets, column, item, kv, h, y, y_stride);
  for (; i < item.num_tokens; ++i) expand_tokens<1>(tokens + i, offsets, column, item, kv, h, y, y_stride);
}

// One slice of one segment for up to TOKENS tokens: all the shrink items that its expand items wait for.
struct Group { size_t shrink_end, expand_end; };

struct Work {
  std::vector<Item> shrink, expand;
  std::vector<Group> groups;
  int64_t products = 0;
};

void plan(const Batch& batch, const Part& part, Work& work) {
  work.shrink.clear();
  work.expand.clear();
  work.groups.clear();
  work.products = 0;
  for (int64_t g = 0; g < batch.num_segments; ++g) {
    int64_t out_start = 0;
    for (int64_t s = 0; s < part.num_slices; out_start += part.widths[s++]) {
      int64_t rank = stored_rows(batch.rows(g, part.first_slice + s, 0, 0, part.num_pieces), batch.rank[g]);
      if (rank == 0) continue;
      work.products += batch.len[g] * rank * (part.in_features + part.widths[s]);
      for (int64_t t = 0; t < batch.len[g]; t += TOKENS) {
        Item item{g, s, 0, 0, batch.start[g] + t, least(TOKENS, batch.len[g] - t), rank, out_start};
        for (item.first = 0; item.first < rank; item.first += ROWS) {
          item.count = least(ROWS, rank - item.first);
          work.shrink.push_back(item);
        }
        for (item.first = 0; item.first < part.widths[s]; item.first += item.count) {
          const int64_t left_of_piece = part.piece_elems - item.first % part.piece_elems;
          item.count = least(COLUMNS, least(left_of_piece, part.widths[s] - item.first));
          work.expand.push_back(item);
        }
        work.groups.push_back({work.shrink.size(), work.expand.size()});
      }
    }
  }
}

enum Steps { SHRINK = 1, EXPAND = 2 };

template <class X, class W>
void run(const Work& work, const Batch& batch, const Part& part, const X* x, int64_t x_stride, X* y, int64_t y_stride,
         const W* kv, Hidden h, int steps, int num_threads) {
  const int64_t num_shrink = steps & SHRINK ? work.shrink.size() : 0;
  const int64_t num_expand = steps & EXPAND ? work.expand.size() : 0;
  const int64_t num_groups = work.groups.size();
  // Enough groups to go round: a thread does a group from end to end, and nobody waits between shrink and expand. A
  // barrier is dear when some thread has lost its core to another process.
  const bool by_group = steps == (SHRINK | EXPAND) && num_groups >= GROUPS_PER_THREAD * num_threads;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    if (by_group) {
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t g = 0; g < num_groups; ++g) {
        const Group begin = g ? work.groups[g - 1] : Group{0, 0}, end = work.groups[g];
        for (size_t i = begin.shrink_end; i < end.shrink_end; ++i)
          shrink_item(work.shrink[i], batch, part, x, x_stride, kv, h);
        for (size_t i = begin.expand_end; i < end.expand_end; ++i)
          expand_item(work.expand[i], batch, part, kv, h, y, y_stride);
      }
    } else {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < num_shrink; ++i) shrink_item(work.shrink[i], batch, part, x, x_stride, kv, h);
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t i = 0; i < num_expand; ++i) expand_item(work.expand[i], batch, part, kv, h, y, y_stride);
    }
  }
}

template <class X, class W>
void typed(const Work& work, const Batch& batch, const Part& part, const void* x, int64_t x_stride, void* y,
           int64_t y_stride, const void* kv, Hidden h, int steps, int num_threads) {
  run(work, batch, part, static_cast<const X*>(x), x_stride, static_cast<X*>(y), y_stride, static_cast<const W*>(kv), h,
      steps, num_threads);
}

using Typed = decltype(&typed<float, float>);
// [dtype of x and y][dtype of the weights]: 0 float, 1 float16, 2 bfloat16.
const Typed TYPED[3][3] = {
    {typed<float, float>, typed<float, Float16>, typed<float, BFloat16>},
    {typed<Float16, float>, typed<Float16, Float16>, typed<Float16, BFloat16>},
    {typed<BFloat16, float>, typed<BFloat16, Float16>, typed<BFloat16, BFloat16>},
};

}  // namespace

// h null: scratch of this thread, reused from call to call. Strides count elements. Returns 0, or 1 if out of memory.
extern "C" int chameleon_paged_lora(int steps, const void* x, int64_t x_stride, void* y, int64_t y_stride, const void* kv,
                                    const int64_t* meta, int64_t max_adapters, int64_t num_tokens, int64_t first_slice,
                                    int64_t num_slices, int64_t in_features, int64_t piece_elems, int64_t num_pieces,
                                    const int64_t* widths, float* h, int64_t h_slice_stride, int64_t h_token_stride,
                                    int x_dtype, int w_dtype, int num_threads) {
  static thread_local Work work;
  static thread_local std::vector<float> scratch;
  const Batch batch(meta, max_adapters);
  const Part part{first_slice, num_slices, in_features, piece_elems, num_pieces, widths};
  Hidden hidden{h, h_slice_stride, h_token_stride};
  try {
    plan(batch, part, work);
    if (h == nullptr) {
      int64_t widest = 1;
      for (int64_t g = 0; g < batch.num_segments; ++g) widest = batch.rank[g] > widest ? batch.rank[g] : widest;
      if (int64_t(scratch.size()) < num_slices * num_tokens * widest) scratch.resize(num_slices * num_tokens * widest);
      hidden = Hidden{scratch.data(), num_tokens * widest, widest};
    }
  } catch (...) {
    return 1;
  }
  if (work.products < SERIAL_PRODUCTS) num_threads = 1;
  TYPED[x_dtype][w_dtype](work, batch, part, x, x_stride, y, y_stride, kv, hidden, steps, num_threads);
  return 0;
}

// Fake-quantize in one pass over memory, for the vector unit of the machine that compiles it.
//
// A tensor of n elements is rows of `inner` elements (the last may be shorter); row r belongs to block r % groups.
// Codes are those of a float32 division, rounded half to even (see affine.py); no compiler flag may contract or
// reorder arithmetic here, but for the fused multiply-adds that are written out.
#include <ATen/cpu/vec/vec.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using Float = at::vec::Vectorized<float>;
constexpr int64_t WIDTH = Float::size();
constexpr int64_t CHUNK = 512;  // elements at a time, a multiple of WIDTH

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
constexpr bool HAS_FMA = true;
#else
constexpr bool HAS_FMA = false;
#endif

// The quotient x / s, correctly rounded.
//
// With y = 1/s in two parts, q = fma(x, y_hi, x * y_lo) is within an ulp of x / s, the residual x - q s is exact, and
// fma(residual, y_hi, q) is x / s correctly rounded (Markstein 1990, theorem 8.1): off by at most 2^-25 / m ulp before
// the last rounding, m in (1, 2) the significand of y, while no quotient lies nearer than 2^-25 m ulp to a rounding
// boundary. Where m is too close to 1 (s just below a power of two), or an intermediate result could leave the
// normal range, the division is done.
struct Division {
  Float scale, minus_scale, y_hi, y_lo;
  bool fused;

  explicit Division(float s) : scale(s), minus_scale(-s) {
    const double y = 1.0 / s;
    y_hi = Float(static_cast<float>(y));
    y_lo = Float(static_cast<float>(y - static_cast<float>(y)));
    int exponent;
    const float significand = std::frexp(s, &exponent);  // in [0.5, 1)
    fused = HAS_FMA && exponent > -90 && exponent < 90 && significand < 1 - 0x1p-20f;
  }

  Float divided(Float x) const { return x / scale; }
  Float multiplied(Float x) const {
    const Float q = at::vec::fmadd(x, y_hi, x * y_lo);
    return at::vec::fmadd(at::vec::fmadd(q, minus_scale, x), y_hi, q);
  }
};

// The smallest float32 x for which `outside(x)` holds, outside being monotone, from a guess.
template <typename Outside>
float first(float x, Outside outside) {
  while (outside(x)) x = std::nextafter(x, -INFINITY);
  while (!outside(x) && x < INFINITY) x = std::nextafter(x, INFINITY);
  return x;
}

// The closed interval of x that the range of codes covers.
struct Interval {
  float lowest, highest;

  Interval(float s, float z, float quant_min, float quant_max, bool is_drawn) {
    const float below = is_drawn ? -end_drawn(-quant_min, -z, s) : -end(z - quant_min, s);
    const float above = is_drawn ? end_drawn(quant_max, z, s) : end(quant_max - z, s);
    lowest = std::nextafter(below, INFINITY);
    highest = std::nextafter(above, -INFINITY);
  }

  static float end(float code, float s) {
    const float tie = code + 0.5f;
    const bool up = std::fmod(code, 2.0f) != 0;  // a tie rounds to the even neighbour
    return first(tie * s, [=](float x) { return up ? x / s >= tie : x / s > tie; });
  }

  static float end_drawn(float code, float z, float s) {
    return first((code - z) * s, [=](float x) { return x / s + z > code; });
  }

  Float clamp(Float x) const { return at::vec::clamp(x, Float(lowest), Float(highest)); }
};

// One bit for each lane in which a and b are the same.
inline uint16_t same(Float a, Float b) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ);
#else
  return ~(a == b).zero_mask();
#endif
}

// v in the lanes of these bits, 0 in the others
inline Float keep(Float v, uint16_t bits) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_maskz_mov_ps(bits, v);
#else
  float lanes[WIDTH];
  v.store(lanes);
  for (int64_t i = 0; i < WIDTH; ++i) lanes[i] = bits >> i & 1 ? lanes[i] : 0.0f;
  return Float::loadu(lanes);
#endif
}

// What make(block) gives, for a row; made once where there is one block.
template <typename Make>
auto per_block(int64_t groups, Make make) {
  return [=, only = make(0)](int64_t row) { return groups == 1 ? only : make(row % groups); };
}

// f(offset, count) for each vector of a row
template <typename F>
inline void each(int64_t count, F f) {
  int64_t i = 0;
#pragma GCC unroll 4
  for (; i + WIDTH <= count; i += WIDTH) f(i, WIDTH);
  if (i < count) f(i, count - i);
}

template <typename F>
void rows(int64_t n, int64_t inner, int threads, F f) {
  const int64_t count = (n + inner - 1) / inner;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && n > 32768)
  for (int64_t r = 0; r < count; ++r) f(r, r * inner, std::min(inner, n - r * inner));
}

// The hash of rounding.py for the elements from `start` on, {0, ..., 2^24 - 1} / 2^24. The compiler makes vectors of it.
void uniform(uint32_t start, uint32_t key, float* out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    uint32_t h = (start + static_cast<uint32_t>(i)) ^ key;
    h = (h ^ h >> 16) * 0x21F0AAADu + key;
    h = (h ^ h >> 15) * 0xD35A2D97u;
    h ^= h >> 15;
    out[i] = static_cast<float>(static_cast<int32_t>(h >> 8)) * 0x1p-24f;
  }
}

// The cell of each value; returns how many are zero.
int32_t cells_of(const float* x, int32_t* cell, int64_t count, int shift, int32_t below, int32_t side) {
  int32_t zeros = 0;
#pragma omp simd reduction(+ : zeros)
  for (int64_t i = 0; i < count; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, 4);
    const int32_t magnitude = bits & 0x7FFFFFFF;
    zeros += magnitude == 0;
    cell[i] = (std::max((magnitude >> shift) - below, 0) ^ (bits >> 31)) + side;  // -1 - place where negative
  }
  return zeros;
}

}  // namespace

// y = S (q - Z); `inside`, one number for WIDTH elements of a row, holds a bit for each whose code is in range
extern "C" void nearest(const float* x, float* y, uint16_t* inside, const float* scale, const float* zero_point,
                        float quant_min, float quant_max, int64_t n, int64_t inner, int64_t groups, int threads) {
  const int64_t words = (inner + WIDTH - 1) / WIDTH;
  const auto ranges = per_block(groups, [=](int64_t b) {
    return Interval(scale[b], zero_point[b], quant_min, quant_max, false);
  });
  rows(n, inner, threads, [&](int64_t r, int64_t at, int64_t count) {
    const Division by(scale[r % groups]);
    const Interval range = ranges(r);
    uint16_t* bits = inside + r * words;
    const auto quantize = [&](auto quotient) {
      each(count, [&](int64_t i, int64_t k) {
        // Clamped before the division, x has the same codes, and nothing overflows.
        const Float v = Float::loadu(x + at + i, k), clamped = range.clamp(v);
        *bits++ = same(v, clamped);
        // + 0 turns a negative zero into zero
        at::vec::fmadd(quotient(clamped).round(), by.scale, Float(0)).store(y + at + i, k);
      });
    };
    if (by.fused) {
      quantize([&](Float v) { return by.multiplied(v); });
    } else {
      quantize([&](Float v) { return by.divided(v); });
    }
  });
}

// the same of stochastic rounding, the stream of draws being named by its key and x beginning at its element `first`
extern "C" void drawn(const float* x, float* y, uint16_t* inside, const float* scale, const float* zero_point,
                      float quant_min, float quant_max, int64_t n, int64_t inner, int64_t groups, int threads,
                      int32_t key, int32_t first) {
  const int64_t words = (inner + WIDTH - 1) / WIDTH;
  const auto ranges = per_block(groups, [=](int64_t b) {
    return Interval(scale[b], zero_point[b], quant_min, quant_max, true);
  });
  rows(n, inner, threads, [&](int64_t r, int64_t at, int64_t count) {
    const float s = scale[r % groups], z = zero_point[r % groups];
    const Interval range = ranges(r);
    const Float lowest(quant_min - z), highest(quant_max - z);
    uint16_t* bits = inside + r * words;
    float draws[CHUNK];
    each(count, [&](int64_t i, int64_t k) {
      if (i % CHUNK == 0) {
        const uint32_t start = static_cast<uint32_t>(first) + static_cast<uint32_t>(at + i);
        uniform(start, static_cast<uint32_t>(key), draws, std::min(CHUNK, count - i));
      }
      const Float v = Float::loadu(x + at + i, k), q = v / Float(s), lower = q.floor();
      *bits++ = same(v, range.clamp(v));
      const Float code = lower + (q - lower).gt(Float::loadu(draws + i % CHUNK, k));
      at::vec::fmadd(at::vec::clamp(code, lowest, highest), Float(s), Float(0)).store(y + at + i, k);
    });
  });
}

// gx = g where inside, else 0
extern "C" void where_inside(const float* g, float* gx, const uint16_t* inside, int64_t n, int64_t inner,
                             int threads) {
  const int64_t words = (inner + WIDTH - 1) / WIDTH;
  rows(n, inner, threads, [=](int64_t r, int64_t at, int64_t count) {
    const uint16_t* bits = inside + r * words;
    each(count, [&](int64_t i, int64_t k) { keep(Float::loadu(g + at + i, k), *bits++).store(gx + at + i, k); });
  });
}

// The same, and gs = factor / S sum (g y - gx x) over each block: dL/dS of a learned scale (Esser et al. 2020,
// equation 3).
extern "C" void learned_scale(const float* x, const float* y, const float* g, const uint16_t* inside,
                              const float* scale, float* gx, float* gs, float factor, int64_t n, int64_t inner,
                              int64_t groups, int threads) {
  const int64_t words = (inner + WIDTH - 1) / WIDTH;
  std::vector<double> sums((n + inner - 1) / inner);
  rows(n, inner, threads, [&](int64_t r, int64_t at, int64_t count) {
    const uint16_t* bits = inside + r * words;
    for (int64_t start = 0; start < count; start += CHUNK) {  // float sums stay short
      Float sum(0);
      each(std::min(CHUNK, count - start), [&](int64_t i, int64_t k) {
        const int64_t here = at + start + i;
        const Float grad = Float::loadu(g + here, k), passed = keep(grad, *bits++);
        passed.store(gx + here, k);
        sum = sum + (grad * Float::loadu(y + here, k) - passed * Float::loadu(x + here, k));
      });
      float lanes[WIDTH];
      sum.store(lanes);
      for (const float lane : lanes) sums[r] += lane;
    }
  });
  for (int64_t b = 0; b < groups; ++b) {
    double total = 0;
    for (size_t r = b; r < sums.size(); r += groups) total += sums[r];
    gs[b] = static_cast<float>(total) * (factor / scale[b]);
  }
}

// Adds to counts (copies, groups, 2 side) the values of each cell of sketch.py, and to zeros (groups) the zeros, which
// are among those of the smallest cell. A copy for each thread, and two in turn, or a run of equal values would wait.
extern "C" void count_cells(const float* x, int32_t* counts, int64_t* zeros, int64_t n, int64_t groups, int fraction,
                            int lowest, int64_t side, int threads) {
  const int64_t inner = n / groups;
  const int shift = 23 - fraction;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && n > 32768) collapse(2)
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t part = 0; part < threads; ++part) {
      const int64_t from = inner * part / threads, to = inner * (part + 1) / threads;
      int32_t* even = counts + ((2 * part) * groups + g) * 2 * side;
      int32_t* odd = counts + ((2 * part + 1) * groups + g) * 2 * side;
      int64_t found = 0;
      int32_t cell[CHUNK];
      for (int64_t i = from; i < to; i += CHUNK) {
        const int64_t size = std::min(CHUNK, to - i);
        found += cells_of(x + g * inner + i, cell, size, shift, lowest - 1, static_cast<int32_t>(side));
        for (int64_t k = 0; k < size; ++k) ++(k & 1 ? odd : even)[cell[k]];
      }
#pragma omp atomic
      zeros[g] += found;
    }
  }
}

extern "C" int64_t width() { return WIDTH; }

// What turns a token's channels, for rotary.cu and cache.cu: (a, b) -> (a cos - b sin, b cos + a
// sin) for the pairs (d, d + half), or (2d, 2d + 1) when interleaved. Channels from 2 * half on are
// copied.
#pragma once
#include "rows.cuh"

namespace fastattn::cuda {

// The channels of one token and head. cos and sin: its row of the tables, fp32; turn is -1 for the
// opposite angle.
template <class T>
struct Token {
  const T* x;
  T* y;
  const float *cos, *sin;
  int half, D;
  float turn;
  bool interleaved;
};

// Units that the work of a token makes: of pairs, then of channels that are copied.
template <class T>
FASTATTN_HD int pair_units(int half, bool interleaved) {
  return (int)cuts(half, interleaved ? kUnit<T> / 2 : kUnit<T>);
}
template <class T>
FASTATTN_HD int token_units(int half, int D, bool interleaved) {
  return pair_units<T>(half, interleaved) + (int)cuts(D - 2 * half, kUnit<T>);
}

template <class T>
FASTATTN_DEVICE void turn_halves(const Token<T>& token, int d) {
  constexpr int N = kUnit<T>;
  const int left = token.half - d;
  float a[N], b[N], cos[N], sin[N];
  load_unit(token.x + d, left, a);
  load_unit(token.x + token.half + d, left, b);
  load_unit(token.cos + d, left, cos);
  load_unit(token.sin + d, left, sin);
  FASTATTN_UNROLL
  for (int i = 0; i < N; ++i) {
    const float p = a[i], q = b[i], t = token.turn * sin[i];
    a[i] = p * cos[i] - q * t;
    b[i] = q * cos[i] + p * t;
  }
  store_unit(token.y + d, left, a);
  store_unit(token.y + token.half + d, left, b);
}

template <class T>
FASTATTN_DEVICE void turn_neighbours(const Token<T>& token, int d) {
  constexpr int N = kUnit<T>;
  const int left = token.half - d;
  float x[N], cos[N / 2], sin[N / 2];
  load_unit(token.x + 2 * d, 2 * left, x);
  load_unit(token.cos + d, left, cos);
  load_unit(token.sin + d, left, sin);
  FASTATTN_UNROLL
  for (int i = 0; i < N / 2; ++i) {
    const float p = x[2 * i], q = x[2 * i + 1], t = token.turn * sin[i];
    x[2 * i] = p * cos[i] - q * t;
    x[2 * i + 1] = q * cos[i] + p * t;
  }
  store_unit(token.y + 2 * d, 2 * left, x);
}

template <class T>
FASTATTN_DEVICE void turn_unit(const Token<T>& token, int unit) {
  constexpr int N = kUnit<T>;
  const int pairs = pair_units<T>(token.half, token.interleaved);
  if (unit >= pairs) {
    const int d = 2 * token.half + (unit - pairs) * N;
    float x[N];
    load_unit(token.x + d, token.D - d, x);
    store_unit(token.y + d, token.D - d, x);
  } else if (token.interleaved) {
    turn_neighbours(token, unit * (N / 2));
  } else {
    turn_halves(token, unit * N);
  }
}

}  // namespace fastattn::cuda

// The sparse experts for up to 16 rows, by a routing: each expert's weights are read once,
// whatever number of rows it serves. Sums have a fixed order, which depends on the row alone.
//
// Quantized weights are MLX's: values of Bits bits in uint32 words along the inputs, scale and
// bias a group of G. Bits 16 stands for unquantized weights of type T.

// How one lane reads a row: V values a step, 8 or 16 bytes of weights.
template <int Bits>
constexpr int values_a_step() {
  return Bits == 4 ? 16 : 8;
}

// One step's inputs of a lane. Values meant for the higher bits of a word are divided by the
// place's worth, exactly, so that masking the word replaces shifting it.
template <typename T, int Bits, int V>
inline float load_inputs(const device T* x, thread float (&values)[V]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < V; i++) {
    const float value = load(x, i);
    sum += value;
    values[i] = value;
    if (Bits < 16) {
      values[i] *= 1.0f / static_cast<float>(1u << (i * Bits % 32));
    }
  }
  return sum;
}

// acc[o][n] = the product of weight row `first + o` (from the middle of Outputs on, `jump` rows
// further) and the inputs at x + from[n]; all lanes get it.
template <typename T, int Bits, int G, int Columns, int Outputs, int Rows>
inline void multiply(
    const device uint* weight, const device T* scales, const device T* biases, uint first,
    uint jump, const device T* x, thread const uint (&from)[Rows], uint lane,
    thread float (&acc)[Outputs][Rows]) {
  constexpr int V = values_a_step<Bits>();
  constexpr uint word_mask = Bits == 4 ? 0xfu : 0xffu;
#pragma unroll
  for (int o = 0; o < Outputs; o++) {
#pragma unroll
    for (int n = 0; n < Rows; n++) {
      acc[o][n] = 0.0f;
    }
  }
  for (uint c = lane * V; c < Columns; c += 32 * V) {
    float values[Rows][V];
    float sums[Rows];
#pragma unroll
    for (int n = 0; n < Rows; n++) {
      sums[n] = load_inputs<T, Bits>(x + from[n] + c, values[n]);
    }
#pragma unroll
    for (int o = 0; o < Outputs; o++) {
      const uint row = first + o + (o >= Outputs / 2 ? jump : 0);
      float dots[Rows] = {};
      if (Bits == 16) {
        const device T* w = reinterpret_cast<const device T*>(weight) + row * Columns + c;
#pragma unroll
        for (int i = 0; i < V; i++) {
          const float value = load(w, i);
#pragma unroll
          for (int n = 0; n < Rows; n++) {
            dots[n] += values[n][i] * value;
          }
        }
#pragma unroll
        for (int n = 0; n < Rows; n++) {
          acc[o][n] += dots[n];
        }
      } else {
        constexpr uint places = 32 / Bits;  // values a word
        const uint2 words = *reinterpret_cast<const device uint2*>(
            weight + (row * Columns + c) / places);
#pragma unroll
        for (int i = 0; i < V; i++) {
          const uint word = i < V / 2 ? words.x : words.y;
          const float value = static_cast<float>(word & (word_mask << (i * Bits % 32)));
#pragma unroll
          for (int n = 0; n < Rows; n++) {
            dots[n] += values[n][i] * value;
          }
        }
        const uint group = (row * Columns + c) / G;
        const float scale = load(scales, group);
        const float bias = load(biases, group);
#pragma unroll
        for (int n = 0; n < Rows; n++) {
          acc[o][n] += scale * dots[n] + bias * sums[n];
        }
      }
    }
  }
#pragma unroll
  for (int o = 0; o < Outputs; o++) {
#pragma unroll
    for (int n = 0; n < Rows; n++) {
      acc[o][n] = simd_sum(acc[o][n]);
    }
  }
}

// A stack of experts' weights [E, outputs, columns] as MLX stores it; biases and scales are unused
// where the weights are not quantized.
template <typename T>
struct Weights {
  const device uint* weight;
  const device T* scales;
  const device T* biases;
};

template <typename T, int Bits, int G, int Outputs, int Columns>
inline Weights<T> of_expert(thread const Weights<T>& all, uint expert) {
  const ulong values = static_cast<ulong>(expert) * Outputs * Columns;
  const ulong groups = Bits < 16 ? values / G : 0;
  const ulong bytes = Bits < 16 ? values * Bits / 8 : values * sizeof(T);
  return {all.weight + bytes / 4, all.scales + groups, all.biases + groups};
}

// A routing (router.metal) of `count` pairs, which is one array [4 count + 1].
struct Routing {
  const device uint* experts;
  const device uint* rows;
  const device float* weights;
  const device uint* starts;
  uint count;
};

inline Routing as_routing(const device uint* routing, uint size) {
  const uint count = size / 4;
  return {
      routing, routing + count, reinterpret_cast<const device float*>(routing + 2 * count),
      routing + 3 * count, count};
}

// Outputs of gate and up that a simdgroup makes at once, and outputs of down.
constant constexpr int kPairs = 4;
constant constexpr int kOutputs = 4;

template <typename T, int Bits, int G, int H, int I, int Rows>
inline void gate_up_rows(
    thread const Weights<T>& weights, const device T* x, const device uint* rows, uint pair,
    uint output, uint lane, device T* y) {
  uint from[Rows];
#pragma unroll
  for (int n = 0; n < Rows; n++) {
    from[n] = rows[pair + n] * H;
  }
  float acc[2 * kPairs][Rows];
  multiply<T, Bits, G, H>(
      weights.weight, weights.scales, weights.biases, output, I - kPairs, x, from, lane, acc);
#pragma unroll
  for (int p = 0; p < kPairs; p++) {
#pragma unroll
    for (int n = 0; n < Rows; n++) {
      if (lane == p * Rows + n) {
        y[(pair + n) * I + output + p] = static_cast<T>(silu(acc[p][n]) * acc[kPairs + p][n]);
      }
    }
  }
}

// y = silu(gate x) up x for every pair of the routing. A threadgroup owns one distinct expert and
// SG kPairs of its outputs.
//
// x: [R, H]; weight: gate's I rows, then up's, of each expert, [E, 2 I, H]; y: [N, I], in the
// routing's order.
template <typename T, int Bits, int G, int H, int I, int SG>
inline void expert_gate_up(
    const device T* x, thread const Weights<T>& weights, thread const Routing& routing,
    device T* y, uint block, uint distinct, uint lane, uint simdgroup) {
  const uint output = (block * SG + simdgroup) * kPairs;
  const uint end = routing.starts[distinct + 1];
  if (output >= I) {
    return;
  }
  const Weights<T> own = of_expert<T, Bits, G, 2 * I, H>(weights, routing.experts[distinct]);
  uint pair = routing.starts[distinct];
  for (; pair + 2 <= end; pair += 2) {
    gate_up_rows<T, Bits, G, H, I, 2>(own, x, routing.rows, pair, output, lane, y);
  }
  if (pair < end) {
    gate_up_rows<T, Bits, G, H, I, 1>(own, x, routing.rows, pair, output, lane, y);
  }
}

template <typename T, int Bits, int G, int H, int I, int Rows>
inline void down_rows(
    thread const Weights<T>& weights, const device T* x, thread const Routing& routing, uint pair,
    uint output, uint lane, thread float (&sums)[kOutputs]) {
  uint from[Rows];
#pragma unroll
  for (int n = 0; n < Rows; n++) {
    from[n] = (pair + n) * I;
  }
  float acc[kOutputs][Rows];
  multiply<T, Bits, G, I>(
      weights.weight, weights.scales, weights.biases, output, 0, x, from, lane, acc);
#pragma unroll
  for (int n = 0; n < Rows; n++) {
    if (lane == routing.rows[pair + n]) {
      const float weight = routing.weights[pair + n];
#pragma unroll
      for (int o = 0; o < kOutputs; o++) {
        sums[o] += weight * acc[o][n];
      }
    }
  }
}

// y = residual + the weighted sum of down x over a row's experts. A threadgroup owns SG kOutputs
// outputs of all rows; lane n keeps the sums of row n.
//
// x: [N, I], in the routing's order; weight: [E, H, I]; residual, y: [R, H].
template <typename T, int Bits, int G, int H, int I, int SG>
inline void expert_down(
    const device T* x, thread const Weights<T>& weights, thread const Routing& routing,
    const device T* residual, device T* y, uint R, uint block, uint lane, uint simdgroup) {
  const uint output = (block * SG + simdgroup) * kOutputs;
  if (output >= H) {
    return;
  }
  float sums[kOutputs] = {};
  uint pair = 0;
  for (uint distinct = 0; pair < routing.count; distinct++) {
    const Weights<T> own = of_expert<T, Bits, G, H, I>(weights, routing.experts[distinct]);
    const uint end = routing.starts[distinct + 1];
    for (; pair + 2 <= end; pair += 2) {
      down_rows<T, Bits, G, H, I, 2>(own, x, routing, pair, output, lane, sums);
    }
    if (pair < end) {
      down_rows<T, Bits, G, H, I, 1>(own, x, routing, pair, output, lane, sums);
      pair++;
    }
  }
  if (lane < R) {
#pragma unroll
    for (int o = 0; o < kOutputs; o++) {
      const uint i = lane * H + output + o;
      y[i] = static_cast<T>(load(residual, i) + sums[o]);
    }
  }
}

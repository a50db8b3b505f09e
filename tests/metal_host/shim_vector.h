// Vectors of two, three and four numbers, with the swizzles that compute kernels use.
#pragma once

namespace metal {

template <typename T, int N>
struct vec;

// `v.xy` and the like: a view of some elements of a vector, in the vector's own storage.
template <typename T, int N, int... I>
struct swizzle {
  T element[N];

  operator vec<T, sizeof...(I)>() const { return vec<T, sizeof...(I)>{element[I]...}; }
  swizzle& operator=(const vec<T, sizeof...(I)>& other) {
    int k = 0;
    ((element[I] = other[k++]), ...);
    return *this;
  }
  swizzle& operator=(const swizzle& other) {
    return *this = static_cast<vec<T, sizeof...(I)>>(other);
  }
};

template <typename T, int N>
struct vec_storage;

template <typename T>
struct alignas(2 * sizeof(T)) vec_storage<T, 2> {
  union {
    T element[2];
    struct {
      T x, y;
    };
    swizzle<T, 2, 0, 1> xy;
    swizzle<T, 2, 1, 0> yx;
  };
  vec_storage() = default;
};

// Three elements take the room of four, as in Metal.
template <typename T>
struct alignas(4 * sizeof(T)) vec_storage<T, 3> {
  union {
    T element[3];
    struct {
      T x, y, z;
    };
    swizzle<T, 3, 0, 1> xy;
    swizzle<T, 3, 1, 2> yz;
  };
  vec_storage() = default;
};

template <typename T>
struct alignas(4 * sizeof(T)) vec_storage<T, 4> {
  union {
    T element[4];
    struct {
      T x, y, z, w;
    };
    swizzle<T, 4, 0, 1> xy;
    swizzle<T, 4, 2, 3> zw;
    swizzle<T, 4, 0, 2> xz;
    swizzle<T, 4, 1, 3> yw;
    swizzle<T, 4, 0, 1, 2> xyz;
    swizzle<T, 4, 1, 2, 3> yzw;
    swizzle<T, 4, 3, 2, 1, 0> wzyx;
    swizzle<T, 4, 2, 3, 0, 1> zwxy;
    swizzle<T, 4, 1, 0, 3, 2> yxwz;
  };
  vec_storage() = default;
};

#define MSL_EACH(i) _Pragma("GCC unroll 4") for (int i = 0; i < N; i++)

template <typename T, int N>
struct vec : vec_storage<T, N> {
  using vec_storage<T, N>::element;

  vec() = default;
  // One access of the vector's whole size, which is what the alignment check looks at.
  vec(const vec& other) { copy(other); }
  vec& operator=(const vec& other) {
    copy(other);
    return *this;
  }
  template <typename S>
    requires is_scalar_v<S>
  vec(S scalar) {
    MSL_EACH(i) element[i] = static_cast<T>(scalar);
  }
  template <typename U>
  explicit vec(const vec<U, N>& other) {
    MSL_EACH(i) element[i] = static_cast<T>(other.element[i]);
  }
  template <typename A, typename B, typename... Rest>
  vec(const A& a, const B& b, const Rest&... rest) {
    static_assert(width<A>() + width<B>() + (0 + ... + width<Rest>()) == N,
                  "a vector built from the wrong number of elements");
    int k = 0;
    append(k, a);
    append(k, b);
    (append(k, rest), ...);
  }

  T& operator[](int i) { return element[i]; }
  const T& operator[](int i) const { return element[i]; }

  vec operator-() const {
    vec result;
    MSL_EACH(i) result.element[i] = -element[i];
    return result;
  }
  vec operator~() const {
    vec result;
    MSL_EACH(i) result.element[i] = ~element[i];
    return result;
  }

#define MSL_VECTOR_OPERATOR(op)                                                            \
  friend vec operator op(const vec& a, const vec& b) {                                     \
    vec result;                                                                            \
    MSL_EACH(i) result.element[i] = a.element[i] op b.element[i];                          \
    return result;                                                                         \
  }                                                                                        \
  vec& operator op##=(const vec& b) { return *this = *this op b; }
  MSL_VECTOR_OPERATOR(+)
  MSL_VECTOR_OPERATOR(-)
  MSL_VECTOR_OPERATOR(*)
  MSL_VECTOR_OPERATOR(/)
  MSL_VECTOR_OPERATOR(%)
  MSL_VECTOR_OPERATOR(&)
  MSL_VECTOR_OPERATOR(|)
  MSL_VECTOR_OPERATOR(^)
  MSL_VECTOR_OPERATOR(<<)
  MSL_VECTOR_OPERATOR(>>)
#undef MSL_VECTOR_OPERATOR

#define MSL_VECTOR_COMPARISON(op)                                                          \
  friend vec<bool, N> operator op(const vec& a, const vec& b) {                            \
    vec<bool, N> result;                                                                   \
    MSL_EACH(i) result.element[i] = a.element[i] op b.element[i];                          \
    return result;                                                                         \
  }
  MSL_VECTOR_COMPARISON(<)
  MSL_VECTOR_COMPARISON(>)
  MSL_VECTOR_COMPARISON(<=)
  MSL_VECTOR_COMPARISON(>=)
  MSL_VECTOR_COMPARISON(==)
  MSL_VECTOR_COMPARISON(!=)
#undef MSL_VECTOR_COMPARISON

 private:
  void copy(const vec& other) {
    __builtin_memcpy(static_cast<void*>(this), static_cast<const void*>(&other), sizeof *this);
  }

  template <typename A>
  struct part {
    static constexpr int width = 1;
  };
  template <typename U, int M>
  struct part<vec<U, M>> {
    static constexpr int width = M;
  };
  template <typename U, int M, int... I>
  struct part<swizzle<U, M, I...>> {
    static constexpr int width = sizeof...(I);
  };
  template <typename A>
  static constexpr int width() {
    return part<A>::width;
  }

  template <typename A>
    requires is_scalar_v<A>
  void append(int& k, A scalar) {
    element[k++] = static_cast<T>(scalar);
  }
  template <int M>
  void append(int& k, const vec<T, M>& other) {
    for (int i = 0; i < M; i++) element[k++] = other[i];
  }
  template <int M, int... I>
  void append(int& k, const swizzle<T, M, I...>& other) {
    append(k, static_cast<vec<T, sizeof...(I)>>(other));
  }
};

#define MSL_VECTOR_NAMES(type)                                                             \
  typedef vec<type, 2> type##2;                                                            \
  typedef vec<type, 3> type##3;                                                            \
  typedef vec<type, 4> type##4;
MSL_VECTOR_NAMES(bool)
MSL_VECTOR_NAMES(char)
MSL_VECTOR_NAMES(uchar)
MSL_VECTOR_NAMES(short)
MSL_VECTOR_NAMES(ushort)
MSL_VECTOR_NAMES(int)
MSL_VECTOR_NAMES(uint)
MSL_VECTOR_NAMES(long)
MSL_VECTOR_NAMES(ulong)
MSL_VECTOR_NAMES(half)
MSL_VECTOR_NAMES(float)
MSL_VECTOR_NAMES(bfloat)
#undef MSL_VECTOR_NAMES

}  // namespace metal

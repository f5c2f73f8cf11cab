// Runs a unit that yosys has turned into C++ (CXXRTL): words go in, words come out.
//
//   unit STALLS WANTED < words         the first WANTED words that leave, of 64 bits each
//   unit STALLS WANTED FIRST           where FIRST, FIRST + 1, .. go in
//
// Both streams wait in STALLS of 256 cycles, by chance. The cycles are printed at the end.
//
// DESIGN is the file with the class TOP. A unit with streams has the ports IN and OUT; another
// (LATENCY > 0) takes a gap in each cycle and gives its power LATENCY cycles later.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include DESIGN

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define OF(port, member) top.JOIN(port, member)

namespace {

cxxrtl_design::TOP top;
std::vector<uint64_t> kept;
uint64_t chance = 88172645463325252ull;

template <size_t Bits>
uint64_t read(const cxxrtl::value<Bits> &port) {
  return port.template get<uint64_t>();
}
template <size_t Bits>
uint64_t read(const cxxrtl::wire<Bits> &port) {
  return port.curr.template get<uint64_t>();
}

bool waits(unsigned stalls) {
  chance ^= chance << 13, chance ^= chance >> 7, chance ^= chance << 17;
  return (chance >> 32 & 255) < stalls;
}

void tick() {
  top.p_clk.set<bool>(true);
  top.step();
  top.p_clk.set<bool>(false);
}

void flush() {
  fwrite(kept.data(), 8, kept.size(), stdout);
  kept.clear();
}

void keep(uint64_t word) {
  kept.push_back(word);
  if (kept.size() == 1 << 16) flush();
}

struct Source {
  bool counts;
  uint64_t word;
  bool ended = false;
  std::vector<uint64_t> buffer;
  size_t place = 0;

  void next() {
    if (counts) {
      word++;
      return;
    }
    if (place == buffer.size()) {
      buffer.resize(1 << 16), place = 0;
      buffer.resize(fread(buffer.data(), 8, buffer.size(), stdin));
    }
    ended = buffer.empty();
    if (!ended) word = buffer[place++];
  }
};

}  // namespace

int main(int argc, char **argv) {
  const unsigned stalls = atoi(argv[1]);
  const uint64_t wanted = strtoull(argv[2], nullptr, 10);
  const uint64_t mask = (1ull << BITS) - 1;
  Source source{argc > 3, argc > 3 ? uint64_t(atoll(argv[3])) : 0};
  uint64_t cycles = 0, given = 0;
  top.p_rst.set<bool>(false);
  top.step();
  if (!source.counts) source.next();
#if LATENCY
  top.p_advance.set<bool>(true);
  for (; given < wanted; cycles++) {
    top.p_gap.set<uint64_t>(source.word & mask);
    top.step();
    tick();
    if (cycles + 1 >= LATENCY) keep(read(top.p_power)), given++;
    source.next();
  }
#else
  for (; given < wanted; cycles++) {
    const bool offers = !source.ended && !waits(stalls), takes = !waits(stalls);
    OF(IN, ____valid).set<bool>(offers);
    OF(IN, ____payload).set<uint64_t>(source.word & mask);
    OF(OUT, ____ready).set<bool>(takes);
    top.step();
    const bool taken = offers && read(OF(IN, ____ready));
    if (takes && read(OF(OUT, ____valid))) keep(read(OF(OUT, ____payload))), given++;
    tick();
    if (taken) source.next();
  }
#endif
  flush();
  fprintf(stderr, "%llu\n", static_cast<unsigned long long>(cycles));
}

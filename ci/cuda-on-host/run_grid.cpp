// Runs a grid on one CPU thread: block after block, the threads of a block as fibers.
//
// A thread runs until it ends or waits at a barrier or a warp operation. Which block and which
// thread comes next is drawn by a seeded generator, so that code that counts on an order fails.

#include "runtime.h"

#include <dlfcn.h>
#include <link.h>
#include <stdarg.h>
#include <sys/mman.h>

#include <algorithm>
#include <random>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_host {
namespace {

constexpr size_t STACK = 256 << 10, GUARD = 4 << 10;

enum class State { READY, AT_BARRIER, IN_WARP, EXITED };

struct Fiber {
    State state = State::READY;
    uint3 thread{};
    char* stack = nullptr; // none before the first run and after the end
    void* stack_pointer = nullptr;
    void* fake_stack = nullptr;
    // Where it waits, and in a warp operation: with whom, what it brings, what it gets.
    const char* file = nullptr;
    int line = 0;
    unsigned mask = 0;
    uint64_t value = 0;
    int source = 0;
    unsigned votes = 0;
};

std::mt19937_64 rng(1);
std::vector<Fiber> fibers;
std::vector<int> ready;
std::vector<char*> stacks; // free ones
int current, exited, in_warp; // the running thread, and how many have ended or wait for lanes
const Kernel* kernel;
void** parameters;
std::string fault_text;
void* scheduler_stack_pointer;

// ---- Switching ----

extern "C" void cuda_on_host_switch(void** save, void* load);
#if !defined(__x86_64__)
#error "write cuda_on_host_switch for this processor: save the callee-saved registers, swap stacks"
#endif
asm(R"(
    .text
    .globl cuda_on_host_switch
    .hidden cuda_on_host_switch
    .type cuda_on_host_switch, @function
cuda_on_host_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
)");

// AddressSanitizer has to know on which stack it is.
const void* scheduler_stack;
size_t scheduler_bytes;
#ifdef __SANITIZE_ADDRESS__
void leave(void** fake, const void* stack, size_t bytes) { __sanitizer_start_switch_fiber(fake, stack, bytes); }
void arrive_in_scheduler(void* fake) { __sanitizer_finish_switch_fiber(fake, nullptr, nullptr); }
void arrive_in_fiber(void* fake) { __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_bytes); }
// Forgets the frames in the last bytes of a stack, which did not return.
void clean(char* stack, size_t bytes) { __asan_unpoison_memory_region(stack + STACK - bytes, bytes); }
#else
void leave(void**, const void*, size_t) {}
void arrive_in_scheduler(void*) {}
void arrive_in_fiber(void*) {}
void clean(char*, size_t) {}
#endif

/// From a fiber to the scheduler.
void yield() {
    Fiber& fiber = fibers[current];
    bool ends = fiber.state == State::EXITED;
    leave(ends ? nullptr : &fiber.fake_stack, scheduler_stack, scheduler_bytes);
    cuda_on_host_switch(&fiber.stack_pointer, scheduler_stack_pointer);
    arrive_in_fiber(fibers[current].fake_stack);
}

void finish_warp_operation(int lane);

void thread_main() {
    arrive_in_fiber(nullptr);
    kernel->call(parameters);
    fibers[current].state = State::EXITED;
    exited++;
    // Others of the warp may have waited for this thread only.
    int first = current / 32 * 32, last = std::min(first + 32, int(fibers.size()));
    for (int lane = first; lane < last && in_warp > 0; lane++)
        if (fibers[lane].state == State::IN_WARP) finish_warp_operation(lane);
    yield();
}

char* new_stack() {
    char* stack = static_cast<char*>(mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (stack == MAP_FAILED || mprotect(stack, GUARD, PROT_NONE) != 0) {
        perror("stack of a CUDA thread");
        abort();
    }
    return stack;
}

void run_thread(int index) {
    current = index;
    Fiber& fiber = fibers[index];
    threadIdx = fiber.thread;
    if (!fiber.stack) {
        if (stacks.empty()) stacks.push_back(new_stack());
        fiber.stack = stacks.back();
        stacks.pop_back();
        clean(fiber.stack, 4 << 10); // of thread_main and yield
        // As if it had called cuda_on_host_switch at the start of thread_main.
        void** top = reinterpret_cast<void**>(fiber.stack + STACK);
        top[-1] = nullptr;
        top[-2] = reinterpret_cast<void*>(thread_main);
        fiber.stack_pointer = top - 2 - 6;
    }
    void* fake = nullptr;
    leave(&fake, fiber.stack, STACK);
    cuda_on_host_switch(&scheduler_stack_pointer, fiber.stack_pointer);
    arrive_in_scheduler(fake);
    if (fiber.state == State::EXITED) {
        stacks.push_back(fiber.stack);
        fiber.stack = nullptr;
    }
}

// ---- Waiting ----

std::string place(const Fiber& fiber) {
    const char* name = strrchr(fiber.file, '/');
    return std::string(name ? name + 1 : fiber.file) + ":" + std::to_string(fiber.line);
}

bool same_place(const Fiber& a, const Fiber& b) { return a.line == b.line && strcmp(a.file, b.file) == 0; }

std::string who(uint3 at) {
    return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
}

void wait(State state, const char* file, int line) {
    Fiber& fiber = fibers[current];
    fiber.state = state;
    fiber.file = file;
    fiber.line = line;
}

void release(int index) {
    in_warp -= fibers[index].state == State::IN_WARP;
    fibers[index].state = State::READY;
    ready.push_back(index);
}

/// Once all lanes of the operation that `lane` waits in have come, gives each what it asked for.
void finish_warp_operation(int lane) {
    const Fiber& own = fibers[lane];
    int first = lane / 32 * 32, lanes = std::min(32, int(fibers.size()) - first);
    unsigned votes = 0;
    uint64_t values[32];
    bool here[32] = {};
    std::fill(values, values + 32, POISON);
    for (int i = 0; i < lanes; i++) {
        const Fiber& other = fibers[first + i];
        if (!(own.mask >> i & 1) || other.state == State::EXITED) continue;
        if (other.state != State::IN_WARP) return;
        if (other.mask != own.mask || !same_place(other, own))
            fault("lanes of a warp meet in different operations: %s, mask %08x, and %s, mask %08x",
                  place(own).c_str(), own.mask, place(other).c_str(), other.mask);
        here[i] = true;
        values[i] = other.value;
        votes |= unsigned(other.value == 1) << i;
    }
    for (int i = 0; i < lanes; i++) {
        if (!here[i]) continue;
        fibers[first + i].value = values[fibers[first + i].source % 32];
        fibers[first + i].votes = votes;
        release(first + i);
    }
}

const Fiber& warp_operation(unsigned mask, uint64_t value, int source, const char* file, int line) {
    Fiber& fiber = fibers[current];
    wait(State::IN_WARP, file, line);
    in_warp++;
    fiber.mask = mask;
    fiber.value = value;
    fiber.source = source;
    if (!(mask >> current % 32 & 1)) fault("%s: the mask %08x leaves out the lane itself", place(fiber).c_str(), mask);
    finish_warp_operation(current);
    yield();
    return fiber;
}

/// Lets all threads go on that wait at one barrier. Whatever else they wait for never comes.
void finish_barrier() {
    const Fiber* first = nullptr;
    for (const Fiber& fiber : fibers) {
        if (fiber.state == State::EXITED) continue;
        if (!first) first = &fiber;
        if (fiber.state != State::AT_BARRIER || !same_place(fiber, *first)) {
            fault_text = "threads wait for each other: " + who(first->thread) + " at " + place(*first) + ", " +
                         who(fiber.thread) + " at " + place(fiber);
            return;
        }
    }
    for (int i = 0; i < int(fibers.size()); i++)
        if (fibers[i].state == State::AT_BARRIER) release(i);
}

// ---- Grids ----

/// The thread-local segment that holds a kernel's shared variables, on this thread.
std::pair<char*, size_t> shared_memory(void* variable) {
    std::pair<char*, size_t> found{static_cast<char*>(variable), 0};
    dl_iterate_phdr(
        [](dl_phdr_info* library, size_t, void* data) {
            auto& [start, bytes] = *static_cast<std::pair<char*, size_t>*>(data);
            char* segment = static_cast<char*>(library->dlpi_tls_data);
            for (int i = 0; segment && i < library->dlpi_phnum; i++) {
                const auto& header = library->dlpi_phdr[i];
                if (header.p_type != PT_TLS || start < segment || start >= segment + header.p_memsz) continue;
                start = segment;
                bytes = header.p_memsz;
                return 1;
            }
            return 0;
        },
        &found);
    return found;
}

void run_block() {
    fibers.resize(size_t(blockDim.x) * blockDim.y * blockDim.z);
    ready.clear();
    exited = in_warp = 0;
    uint3 thread{};
    for (int i = 0; i < int(fibers.size()); i++) {
        if (fibers[i].stack) { // left behind by a fault
            clean(fibers[i].stack, STACK - GUARD);
            stacks.push_back(fibers[i].stack);
        }
        fibers[i] = Fiber{};
        fibers[i].thread = thread;
        if (++thread.x == blockDim.x) thread.x = 0, thread.y++;
        if (thread.y == blockDim.y) thread.y = 0, thread.z++;
        ready.push_back(i);
    }
    while (fault_text.empty() && exited < int(fibers.size())) {
        if (ready.empty()) {
            finish_barrier();
            continue;
        }
        std::swap(ready[rng() % ready.size()], ready.back());
        int next = ready.back();
        ready.pop_back();
        run_thread(next);
    }
}
} // namespace

void block_barrier(const char* file, int line) {
    wait(State::AT_BARRIER, file, line);
    yield();
}

uint64_t exchange(unsigned mask, uint64_t value, int source, const char* file, int line) {
    return warp_operation(mask, value, source, file, line).value;
}

unsigned ballot(unsigned mask, bool vote, const char* file, int line) {
    return warp_operation(mask, vote, 0, file, line).votes;
}

void fault(const char* format, ...) {
    char text[1000];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    fault_text = "thread " + who(threadIdx) + ": " + text;
    yield(); // for good: the scheduler gives up on a fault
    abort();
}

std::string run_grid(const Kernel& of, dim3 grid, dim3 block, void** params) {
    kernel = &of;
    parameters = params;
    gridDim = grid;
    blockDim = block;
    fault_text.clear();
    std::vector<uint3> blocks;
    blocks.reserve(size_t(grid.x) * grid.y * grid.z);
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) blocks.push_back({x, y, z});
    std::shuffle(blocks.begin(), blocks.end(), rng);
    auto [shared, bytes] = shared_memory(of.shared());
    for (uint3 at : blocks) {
        blockIdx = at;
        memset(shared, 0xff, bytes); // NaN in every float type
        run_block();
        if (!fault_text.empty()) return of.name + ": block " + who(at) + ": " + fault_text;
    }
    return "";
}

void set_seed(uint64_t seed) { rng.seed(seed); }
} // namespace cuda_on_host

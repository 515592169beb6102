// Work dealt out to torch's own OpenMP pool.
#pragma once

#include <pthread.h>
#include <stdint.h>

typedef void (*gomp_parallel_t)(void (*)(void*), void*, unsigned, unsigned);
static gomp_parallel_t gomp_parallel = nullptr;

// An OpenMP pool does not survive fork: its threads are gone and the next region would wait for them for ever.
static void in_child() { gomp_parallel = nullptr; }

// Every thread takes items from one counter until none is left. So fewer threads than asked for are harmless, and which
// thread computes an item changes nothing in the result.
template <class Job>
static void worker(void* p) {
  Job& job = *(Job*)p;
  for (int64_t i; (i = __atomic_fetch_add(&job.next, 1, __ATOMIC_RELAXED)) < job.items;) job.item(i);
}
template <class Job>
static void parallel(Job& job, int threads) {
  job.next = 0;
  if (threads > job.items) threads = (int)job.items;
  if (threads > 1 && gomp_parallel)
    gomp_parallel(worker<Job>, &job, (unsigned)threads, 0);
  else
    worker<Job>(&job);
}

constexpr int64_t SERIAL = 65536;  // bytes: with less to read, waking a thread costs more than it saves

// The trace file: chunks of fixed records in a memory-mapped file. record/format.py holds the same layout for readers;
// tests/unit/test_trace.py compares the two. A chunk belongs to one thread and one kind of record, so nobody waits for
// anybody; what a chunk's header counts as used is complete, also after SIGKILL.
#pragma once

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace truedag {

constexpr char kFileMagic[8] = {'T', 'R', 'U', 'E', 'D', 'A', 'G', '\0'};
constexpr uint32_t kFormatVersion = 2;
constexpr uint32_t kChunkMagic = 0x4b4e4843;  // "CHNK"
constexpr size_t kFileHeaderBytes = 4096;
constexpr size_t kSegmentBytes = size_t{8} << 20;
constexpr size_t kPageBytes = 4096;
constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, since Linux 5.14
constexpr size_t kSmallestChunkBytes = 4096;
constexpr size_t kLargestChunkBytes = size_t{256} << 10;

enum ChunkKind : uint32_t {
  kEvents = 1,
  kRefs = 2,
  kComms = 3,
  kWorks = 4,
  kTables = 5,
  kTensors = 6,
  kStorages = 7,
  kFrees = 8,
  kWaits = 9,
  kPlaces = 10,
};

enum TableKind : uint32_t {
  kMeta = 1,
  kThread = 2,
  kOp = 3,
  kLayout = 4,
  kGroup = 6,
  kLabel = 7,
  kContext = 8,
  kNamedTensor = 9,
  kGroupRanks = 10,
  kCall = 11,
  kLanes = 12,
};

struct FileHeader {
  char magic[8];
  uint32_t version;
  uint32_t header_bytes;
  uint64_t closed;  // 1 once the recorder has stopped in good order
};

struct ChunkHeader {
  uint32_t magic;
  uint32_t kind;
  uint32_t thread;
  uint32_t record_bytes;  // 0: framed table entries
  uint64_t bytes;         // of the chunk, header included
  uint64_t used;          // of records, header not included
  uint64_t reserved[4];
};
static_assert(sizeof(ChunkHeader) == 64);

enum EventFlags : uint32_t {
  kInBackward = 1,   // ran inside autograd's engine
  kRange = 2,        // an autograd function, not a dispatcher operator: it carries a label to its backward pass
  kFailed = 4,       // raised: there are no outputs
  kIsComm = 8,       // the thread's next comm is its
  kLong = 16,        // the duration is in units of 1024 ns
};

// Its tensors are the thread's next refs, as many as its call has.
struct Event {
  int64_t start_ns;
  uint32_t duration;
  uint32_t call;
  uint32_t sequence;           // the number, modulo 2^32, that autograd gives a node made here; all ones: it makes none
  uint32_t backward_sequence;  // in the backward pass: the number of the node it runs in; all ones: none
  uint32_t fwd_thread;         // and the autograd thread that made that node
  uint32_t label;
  uint32_t context;
  uint32_t flags;
};
static_assert(sizeof(Event) == 40);
constexpr uint32_t kNoSequence = 0xffffffff;

// The number of a tensor of the same thread, from 1; 0: memory that cannot be named (sparse, nested, symbolic).
using Ref = uint32_t;

struct Tensor {
  int64_t offset_bytes;  // of the first element in its storage
  uint32_t storage;
  uint32_t layout;
};
static_assert(sizeof(Tensor) == 16);

struct Storage {
  uint64_t impl;
  uint64_t address;  // of its memory when it was first seen
  uint64_t bytes;
};
static_assert(sizeof(Storage) == 24);

// A storage has other memory than when this thread saw it last.
struct Place {
  uint32_t storage;
  uint32_t event;  // how many events the thread had recorded by then
  uint64_t address;
  uint64_t bytes;
};
static_assert(sizeof(Place) == 24);

// The arg of a tensor that a communication made inside for its own use. Backends hand such memory on: gloo's
// reduce-scatter copies its result out of it when it is waited for.
constexpr uint16_t kScratchArg = 0xffff;

struct Comm {
  int64_t sequence;  // the backend's own count for the group before this operation; -1: it has none
  int64_t order;     // this recorder's own count of operations of this kind (collective, p2p) on the group
  uint32_t group;
  int32_t peer;      // rank in the group of root, source or destination; -1: none
  int32_t tag;
  int32_t reduce_op; // c10d::ReduceOp; -1: none
  uint32_t async_op;
  uint32_t id;       // names this communication to its work's record and to waits; from 1
};
static_assert(sizeof(Comm) == 40);

struct Work {
  int64_t start_ns;
  int64_t end_ns;
  uint32_t comm_id;
  uint32_t op;  // the name under which the backend announced the work
};
static_assert(sizeof(Work) == 24);

struct Free {
  int64_t time_ns;
  uint64_t address;
};
static_assert(sizeof(Free) == 16);

struct Wait {
  int64_t start_ns;
  int64_t end_ns;
  uint32_t comm_id;  // 0: of a communication that was not recorded
  uint32_t reserved;
};
static_assert(sizeof(Wait) == 24);

// Why the recorder can't go on. Thrown wherever there is no room: what was to be written is not, and what goes by it is
// not known either, so that no record names what the file does not hold.
struct RecordingEnds : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The mapped file. `grab` is the only call that locks, once per chunk.
class TraceFile {
 public:
  TraceFile() = default;
  TraceFile(const TraceFile&) = delete;
  TraceFile& operator=(const TraceFile&) = delete;
  ~TraceFile() {
    if (fd_ >= 0) ::close(fd_);
    for (auto& segment : segments_) ::munmap(segment.base, segment.bytes);
  }

  // Throws when the file can't be made; none is left then.
  void open(const std::string& path, size_t max_bytes) {
    is_bounded_ = max_bytes != 0;
    max_bytes_ = max_bytes / kPageBytes * kPageBytes;
    fd_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (fd_ < 0) fail("cannot create " + path);
    try {
      extend(0);
    } catch (...) {
      ::unlink(path.c_str());
      throw;
    }
    auto* header = reinterpret_cast<FileHeader*>(segments_.back().base);
    std::memcpy(header->magic, kFileMagic, sizeof(kFileMagic));
    header->version = kFormatVersion;
    header->header_bytes = kFileHeaderBytes;
    position_ = kFileHeaderBytes;
  }

  // A zeroed chunk of at least `bytes`. Throws when there is no room.
  [[gnu::cold]] ChunkHeader* grab(ChunkKind kind, uint32_t thread, uint32_t record_bytes, size_t bytes) {
    std::lock_guard<std::mutex> guard(mutex_);
    if (fd_ < 0) throw RecordingEnds("the trace is closed");
    bytes = (bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
    if (position_ + bytes > segments_.back().file_offset + segments_.back().bytes) {
      extend(bytes);
      position_ = segments_.back().file_offset;  // a chunk never crosses segments; the rest stays zero
    }
    auto& segment = segments_.back();
    auto* chunk = reinterpret_cast<ChunkHeader*>(segment.base + (position_ - segment.file_offset));
    position_ += bytes;
    // All its pages in one go, which costs a third of one fault each; where the kernel can't, they fault in.
    ::madvise(chunk, bytes, kPopulateWrite);
    chunk->kind = kind;
    chunk->thread = thread;
    chunk->record_bytes = record_bytes;
    chunk->bytes = bytes;
    reinterpret_cast<std::atomic<uint32_t>*>(&chunk->magic)->store(kChunkMagic, std::memory_order_release);
    return chunk;
  }

  // Marks the file closed and cuts what was reserved and not used.
  void close() {
    std::lock_guard<std::mutex> guard(mutex_);
    if (fd_ < 0) return;
    reinterpret_cast<FileHeader*>(segments_.front().base)->closed = 1;
    const int ignored = ::ftruncate(fd_, static_cast<off_t>(position_));
    (void)ignored;  // a longer file is only a larger one
    ::close(fd_);
    fd_ = -1;
  }

 private:
  struct Segment {
    char* base;
    size_t file_offset;
    size_t bytes;
  };

  [[noreturn]] static void fail(const std::string& what) { throw RecordingEnds(what + ": " + std::strerror(errno)); }

  // Takes blocks. A signal would break that off, and with a timer's it would never end.
  int allocate(size_t offset, size_t bytes) {
    sigset_t all, before;
    ::sigfillset(&all);
    ::pthread_sigmask(SIG_SETMASK, &all, &before);
    int code = EINTR;
    while (code == EINTR) code = ::posix_fallocate(fd_, static_cast<off_t>(offset), static_cast<off_t>(bytes));
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return code;
  }

  void extend(size_t at_least) {
    segments_.reserve(segments_.size() + 1);  // nothing is mapped that could not be written down
    size_t bytes = (std::max(at_least, size_t{1}) + kSegmentBytes - 1) / kSegmentBytes * kSegmentBytes;
    const size_t offset = segments_.empty() ? 0 : segments_.back().file_offset + segments_.back().bytes;
    if (is_bounded_ && offset + bytes > max_bytes_) {
      bytes = max_bytes_ > offset ? max_bytes_ - offset : 0;
      if (bytes < std::max(at_least, 2 * kFileHeaderBytes)) {
        throw RecordingEnds("the trace has reached the size it is allowed (" + std::to_string(max_bytes_) + " bytes)");
      }
    }
    // Blocks are taken now: a full disk is an error here and not a SIGBUS in the middle of the program.
    errno = allocate(offset, bytes);
    if (errno != 0) fail("no room for the trace");
    void* base = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, static_cast<off_t>(offset));
    if (base == MAP_FAILED) fail("cannot map the trace");
    ::madvise(base, bytes, MADV_DONTFORK);  // a forked child has no business here
    segments_.push_back({static_cast<char*>(base), offset, bytes});
  }

  std::mutex mutex_;
  std::vector<Segment> segments_;
  size_t position_ = 0;
  size_t max_bytes_ = 0;
  bool is_bounded_ = false;
  int fd_ = -1;
};

// One thread's (or, under a lock, everybody's) records of one kind.
class Stream {
 public:
  Stream(TraceFile& file, ChunkKind kind, uint32_t thread, uint32_t record_bytes)
      : file_(&file), kind_(kind), thread_(thread), record_bytes_(record_bytes) {}

  // Room for `bytes`, to be filled and then committed. Throws when there is none left.
  char* reserve(size_t bytes) {
    if (chunk_ == nullptr || cursor_ + bytes > end_) {
      const size_t wanted = std::max(chunk_bytes_, bytes + sizeof(ChunkHeader));
      chunk_ = file_->grab(kind_, thread_, record_bytes_, wanted);
      chunk_bytes_ = std::min(2 * chunk_bytes_, kLargestChunkBytes);
      begin_ = reinterpret_cast<char*>(chunk_) + sizeof(ChunkHeader);
      cursor_ = begin_;
      end_ = reinterpret_cast<char*>(chunk_) + chunk_->bytes;
    }
    return cursor_;
  }

  void commit(size_t bytes) {
    cursor_ += bytes;
    __builtin_prefetch(cursor_ + 192, 1);
    if (record_bytes_ != 0) count_ += bytes / record_bytes_;
    reinterpret_cast<std::atomic<uint64_t>*>(&chunk_->used)
        ->store(static_cast<uint64_t>(cursor_ - begin_), std::memory_order_release);
  }

  void append(const void* record, size_t bytes) {
    std::memcpy(reserve(bytes), record, bytes);
    commit(bytes);
  }

  uint64_t count() const { return count_; }

 private:
  TraceFile* file_;
  ChunkKind kind_;
  uint32_t thread_;
  uint32_t record_bytes_;
  size_t chunk_bytes_ = kSmallestChunkBytes;
  ChunkHeader* chunk_ = nullptr;
  char* begin_ = nullptr;
  char* cursor_ = nullptr;
  char* end_ = nullptr;
  uint64_t count_ = 0;
};

}  // namespace truedag

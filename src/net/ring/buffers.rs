//! The memory a ring receives into and sends from.
//!
//! Used by `Ring` alone; sessions hold [`Chunk`]s, which own what they name and
//! give it back when dropped. Nobody but the kernel ever looks into a buffer of
//! the pool: no reference to its bytes is made here or elsewhere.

#![allow(unsafe_code)]

use crate::budget::BudgetShare;
use io_uring::types::BufRingEntry;
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::io;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::atomic::{AtomicU16, Ordering};

/// Length of a pool buffer. 64 KiB measured worse than 16 KiB, and larger ones
/// pin more memory behind slow readers.
pub const BUFFER_LEN: usize = 16 * 1024;

/// More than that is cheaper to keep where it is than to copy.
const ABSORB_MAX: usize = 4 * 1024;

/// Alignment the kernel asks of a buffer ring (io_uring_register_buf_ring(3)).
const RING_ALIGN: usize = 4096;

/// Received bytes, or what is left of them to send.
#[derive(Debug)]
pub struct Chunk {
    source: ChunkSource,
    start: u32,
    len: u32,
}

#[derive(Debug)]
enum ChunkSource {
    Pool(Rc<RingBufferPool>, u16),
    Own(Rc<OwnedBuffer>),
}

/// Bytes outside the pool.
#[derive(Debug)]
struct OwnedBuffer {
    /// Not a `Box`: a pointer into it must stay good while the chunk moves.
    bytes: Rc<[u8]>,
    _share: BudgetShare,
}

/// A fixed number of buffers, some with the kernel, some in chunks, the rest
/// free. The memory is touched, and so takes room, only once it is used.
#[derive(Debug)]
pub(super) struct RingBufferPool {
    base: NonNull<u8>,
    count: u16,
    /// Last in, first out: what was used last is still in the cache.
    free: RefCell<Vec<u16>>,
}

/// The ring in which free buffers are shown to the kernel.
#[derive(Debug)]
pub(super) struct BufferRing {
    entries: NonNull<BufRingEntry>,
    pool: Rc<RingBufferPool>,
    tail: u16,
    /// Shown and not yet taken.
    shown: u16,
    /// How many to show at most. Few are kept hot, many starve nobody.
    target: u16,
    target_min: u16,
}

// === impl Chunk ===

impl Chunk {
    /// A copy of `bytes`, outside the pool; `share` is as many of a budget's.
    pub fn copied(bytes: &[u8], share: BudgetShare) -> Chunk {
        let own = OwnedBuffer { bytes: bytes.into(), _share: share };
        Chunk { source: ChunkSource::Own(Rc::new(own)), start: 0, len: bytes.len() as u32 }
    }

    /// Bytes left in it.
    #[inline]
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether nothing is left in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes the bytes of `other` behind its own, where they are few and there is
    /// room; false where not. A stream of small messages would otherwise pin a
    /// buffer for each.
    pub fn absorb(&mut self, other: &Chunk) -> bool {
        let end = (self.start + self.len) as usize;
        if other.len() > ABSORB_MAX || end + other.len() > BUFFER_LEN {
            return false;
        }
        let ChunkSource::Pool(pool, id) = &self.source else { return false };
        let to = pool.pointer(*id).wrapping_add(end).cast_mut();
        // SAFETY: both ranges lie in their own chunk's buffer (checked above for
        // `to`), and no two chunks share a buffer, so they do not overlap. The
        // kernel uses neither: it is done with a received buffer, and what is
        // being sent has been moved into an operation and cannot be named here.
        unsafe { std::ptr::copy_nonoverlapping(other.pointer(), to, other.len()) };
        self.len += other.len;
        true
    }

    /// Forgets the first `bytes`, at most all of them.
    pub(super) fn advance(&mut self, bytes: usize) {
        let bytes = (bytes as u32).min(self.len);
        self.start += bytes;
        self.len -= bytes;
    }

    /// Where its bytes are; good for as long as the chunk exists, wherever it
    /// is moved to.
    #[inline]
    pub(super) fn pointer(&self) -> *const u8 {
        match &self.source {
            ChunkSource::Pool(pool, id) => pool.pointer(*id).wrapping_add(self.start as usize),
            ChunkSource::Own(own) => own.bytes.as_ptr().wrapping_add(self.start as usize),
        }
    }
}

impl Drop for Chunk {
    #[inline]
    fn drop(&mut self) {
        if let ChunkSource::Pool(pool, id) = &self.source {
            pool.free.borrow_mut().push(*id);
        }
    }
}

// === impl RingBufferPool ===

impl RingBufferPool {
    fn new(count: u16) -> Rc<RingBufferPool> {
        let memory = vec![0_u8; usize::from(count) * BUFFER_LEN].into_boxed_slice();
        let base = NonNull::new(Box::into_raw(memory).cast::<u8>())
            .expect("a box is never at address zero");
        let free = RefCell::new((0..count).rev().collect());
        Rc::new(RingBufferPool { base, count, free })
    }

    #[inline]
    fn pointer(&self, id: u16) -> *const u8 {
        debug_assert!(id < self.count);
        self.base.as_ptr().wrapping_add(usize::from(id) * BUFFER_LEN)
    }
}

impl Drop for RingBufferPool {
    fn drop(&mut self) {
        let len = usize::from(self.count) * BUFFER_LEN;
        let memory = std::ptr::slice_from_raw_parts_mut(self.base.as_ptr(), len);
        // SAFETY: `base` came from `Box::into_raw` of a slice of this length,
        // and is given back once. Nobody else points here: chunks hold the pool
        // alive, and the ring leaks its share where operations may still run.
        drop(unsafe { Box::from_raw(memory) });
    }
}

// === impl BufferRing ===

impl BufferRing {
    /// `count` buffers (a power of two), of which `shown` are shown at first.
    pub(super) fn new(count: u16, shown: u16) -> io::Result<BufferRing> {
        if !count.is_power_of_two() || count > 1 << 15 || shown == 0 {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let layout = BufferRing::layout(count);
        // SAFETY: the layout's size is not zero, as `count` is not.
        let memory = unsafe { alloc_zeroed(layout) };
        let Some(entries) = NonNull::new(memory.cast::<BufRingEntry>()) else {
            handle_alloc_error(layout)
        };
        let target = shown.min(count);
        let pool = RingBufferPool::new(count);
        Ok(BufferRing { entries, pool, tail: 0, shown: 0, target, target_min: target })
    }

    fn layout(count: u16) -> Layout {
        let size = usize::from(count) * size_of::<BufRingEntry>();
        Layout::from_size_align(size, RING_ALIGN)
            .expect("65,536 small entries fit any address space")
    }

    pub(super) fn address(&self) -> u64 {
        self.entries.as_ptr() as u64
    }

    pub(super) fn count(&self) -> u16 {
        self.pool.count
    }

    /// Buffers the kernel can take now.
    #[inline]
    pub(super) fn shown(&self) -> u16 {
        self.shown
    }

    /// Shows free buffers until the target is met or none is left.
    #[inline]
    pub(super) fn refill(&mut self) {
        if self.shown >= self.target {
            return;
        }
        let mut free = self.pool.free.borrow_mut();
        while self.shown < self.target {
            let Some(id) = free.pop() else { break };
            let index = self.tail & (self.pool.count - 1);
            // SAFETY: `index` is below the number of entries allocated.
            let entry = unsafe { self.entries.as_ptr().add(usize::from(index)) };
            // SAFETY: initialised (to zeros), and nobody else's now: the kernel
            // reads entries only below the tail, and at most `count` are ever
            // shown. The tail itself, in the first entry, is not written here.
            let entry = unsafe { &mut *entry };
            entry.set_addr(self.pool.pointer(id) as u64);
            entry.set_len(BUFFER_LEN as u32);
            entry.set_bid(id);
            self.tail = self.tail.wrapping_add(1);
            self.shown += 1;
        }
        // SAFETY: `entries` is the start of the ring, as `tail` asks.
        let tail = unsafe { BufRingEntry::tail(self.entries.as_ptr()) };
        // SAFETY: the tail is an aligned u16 inside the ring's first entry; the
        // kernel reads it with acquire semantics and never writes it.
        let tail = unsafe { AtomicU16::from_ptr(tail.cast_mut()) };
        tail.store(self.tail, Ordering::Release);
    }

    /// The buffer `id` with `len` bytes in it, which the kernel has taken off
    /// the ring. Once for each completion that names a buffer.
    #[inline]
    pub(super) fn taken(&mut self, id: u16, len: usize) -> Chunk {
        assert!(
            id < self.pool.count && len <= BUFFER_LEN,
            "the kernel named a buffer it was not given"
        );
        self.shown = self.shown.saturating_sub(1);
        Chunk { source: ChunkSource::Pool(Rc::clone(&self.pool), id), start: 0, len: len as u32 }
    }

    /// There were too few: shows twice as many from now on.
    pub(super) fn widen(&mut self) {
        self.target = self.target.saturating_mul(2).min(self.pool.count);
    }

    /// Nobody starved for a while: back towards few hot ones.
    pub(super) fn narrow(&mut self) {
        self.target = (self.target / 2).max(self.target_min);
    }

    /// Buffers neither shown nor in chunks.
    pub(super) fn free(&self) -> usize {
        self.pool.free.borrow().len()
    }

    /// Keeps the memory for ever, as operations may still use it.
    pub(super) fn leak(&mut self) {
        std::mem::forget(Rc::clone(&self.pool));
        self.entries = NonNull::dangling();
    }
}

impl Drop for BufferRing {
    fn drop(&mut self) {
        if self.entries == NonNull::dangling() {
            return;
        }
        // SAFETY: allocated in `new` with this very layout and not leaked; the
        // ring it was registered with is closed or has let go of it.
        unsafe { dealloc(self.entries.as_ptr().cast(), BufferRing::layout(self.pool.count)) };
    }
}

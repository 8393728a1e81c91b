//! The memory that a ring receives into and sends from.
//!
//! Used only by `Ring`. Sessions hold [`Chunk`]s, which own their bytes and return the
//! buffer on drop. Only the kernel and `Chunk::absorb` access the bytes of a pool buffer.
//! This code never makes a reference to them.

#![allow(unsafe_code)]

use crate::budget::BudgetShare;
use io_uring::types::BufRingEntry;
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::io;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::atomic::{AtomicU16, Ordering};

/// Length of a pool buffer. 64 KiB was slower than 16 KiB, and larger buffers use more
/// memory for slow readers.
pub const BUFFER_LEN: usize = 16 * 1024;

/// Longest chunk that is copied into another. Copying more costs more than the buffer.
const ABSORB_MAX: usize = 4 * 1024;

/// Alignment that the kernel requires of a buffer ring (io_uring_register_buf_ring(3)).
const RING_ALIGN: usize = 4096;

/// Bytes that were received or must be sent.
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

/// Bytes that are not in a pool buffer.
#[derive(Debug)]
struct OwnedBuffer {
    /// An `Rc` instead of a `Box`, because pointers into it must stay valid when the chunk
    /// moves.
    bytes: Rc<[u8]>,
    _share: BudgetShare,
}

/// A fixed number of buffers. Each is shown to the kernel, in a chunk, or free. A page
/// takes memory only after its first use.
#[derive(Debug)]
pub(super) struct RingBufferPool {
    base: NonNull<u8>,
    count: u16,
    /// Last in, first out, because the buffer used last is still in the CPU cache.
    free: RefCell<Vec<u16>>,
}

/// The ring that shows free buffers to the kernel.
#[derive(Debug)]
pub(super) struct BufferRing {
    entries: NonNull<BufRingEntry>,
    pool: Rc<RingBufferPool>,
    tail: u16,
    /// Buffers that are shown and not yet used.
    shown: u16,
    /// Most buffers to show. Few buffers stay in the CPU cache; many buffers avoid
    /// receives without a buffer.
    target: u16,
    target_min: u16,
}

// === impl Chunk ===

impl Chunk {
    /// Copies `bytes` to memory outside the pool. `share` covers as many bytes of the
    /// memory budget.
    pub fn copied(bytes: &[u8], share: BudgetShare) -> Chunk {
        let own = OwnedBuffer { bytes: bytes.into(), _share: share };
        Chunk { source: ChunkSource::Own(Rc::new(own)), start: 0, len: bytes.len() as u32 }
    }

    /// Returns the number of bytes that are left.
    #[inline]
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Returns whether no byte is left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends the bytes of `other` if there are at most [`ABSORB_MAX`] and they fit.
    /// Returns false if not.
    ///
    /// Without it, a stream of small messages would use one buffer per message.
    pub fn absorb(&mut self, other: &Chunk) -> bool {
        let end = (self.start + self.len) as usize;
        if other.len() > ABSORB_MAX || end + other.len() > BUFFER_LEN {
            return false;
        }
        let ChunkSource::Pool(pool, id) = &self.source else { return false };
        let to = pool.pointer(*id).wrapping_add(end).cast_mut();
        // SAFETY: each range lies in the buffer of its chunk (checked above for `to`).
        // Chunks never share a buffer, so the ranges do not overlap. The kernel uses
        // neither buffer: it has completed the receive, and chunks of a send are owned by
        // the operation, so no caller has a reference to them.
        unsafe { std::ptr::copy_nonoverlapping(other.pointer(), to, other.len()) };
        self.len += other.len;
        true
    }

    /// Removes the first `bytes`, at most all of them.
    pub(super) fn advance(&mut self, bytes: usize) {
        let bytes = (bytes as u32).min(self.len);
        self.start += bytes;
        self.len -= bytes;
    }

    /// Returns the address of its bytes. It stays valid as long as the chunk exists, even
    /// if the chunk moves.
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
        let base = NonNull::new(Box::into_raw(memory).cast::<u8>()).expect("a box is never null");
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
        // SAFETY: `base` came from `Box::into_raw` of a slice of this length and is freed
        // once. No pointer to it remains: chunks hold a share of the pool, and the ring
        // leaks its share if operations may still run.
        drop(unsafe { Box::from_raw(memory) });
    }
}

// === impl BufferRing ===

impl BufferRing {
    /// Makes a ring of `count` buffers (a power of two), of which `shown` are shown first.
    pub(super) fn new(count: u16, shown: u16) -> io::Result<BufferRing> {
        if !count.is_power_of_two() || count > 1 << 15 || shown == 0 {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let layout = BufferRing::layout(count);
        // SAFETY: the size of the layout is not zero, because `count` is not zero.
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

    /// Returns the number of buffers that the kernel can use now.
    #[inline]
    pub(super) fn shown(&self) -> u16 {
        self.shown
    }

    /// Shows free buffers until the target is reached or no buffer is free.
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
            // SAFETY: the entry is initialised (to zeros), and this is the only reference:
            // the kernel reads only entries below the tail, and at most `count` are
            // shown. The setters do not write the tail, which is in the first entry.
            let entry = unsafe { &mut *entry };
            entry.set_addr(self.pool.pointer(id) as u64);
            entry.set_len(BUFFER_LEN as u32);
            entry.set_bid(id);
            self.tail = self.tail.wrapping_add(1);
            self.shown += 1;
        }
        // SAFETY: `entries` is the start of the ring, as `tail` requires.
        let tail = unsafe { BufRingEntry::tail(self.entries.as_ptr()) };
        // SAFETY: the tail is an aligned u16 in the first entry of the ring. The kernel
        // reads it with acquire semantics and never writes it.
        let tail = unsafe { AtomicU16::from_ptr(tail.cast_mut()) };
        tail.store(self.tail, Ordering::Release);
    }

    /// Returns the buffer `id` with `len` bytes, which the kernel has removed from the
    /// ring. Call it once per completion that names a buffer.
    #[inline]
    pub(super) fn taken(&mut self, id: u16, len: usize) -> Chunk {
        assert!(
            id < self.pool.count && len <= BUFFER_LEN,
            "the kernel named a buffer it was not given"
        );
        self.shown = self.shown.saturating_sub(1);
        Chunk { source: ChunkSource::Pool(Rc::clone(&self.pool), id), start: 0, len: len as u32 }
    }

    /// Doubles the target, after a receive found no buffer.
    pub(super) fn widen(&mut self) {
        self.target = self.target.saturating_mul(2).min(self.pool.count);
    }

    /// Halves the target, so that the buffers stay in the CPU cache.
    pub(super) fn narrow(&mut self) {
        self.target = (self.target / 2).max(self.target_min);
    }

    /// Returns the number of buffers that are neither shown nor in chunks.
    pub(super) fn free(&self) -> usize {
        self.pool.free.borrow().len()
    }

    /// Leaks the memory, because operations may still use it.
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
        // SAFETY: `new` allocated it with this layout, and it was not leaked. The ring it
        // was registered with is closed, or its registration failed.
        unsafe { dealloc(self.entries.as_ptr().cast(), BufferRing::layout(self.pool.count)) };
    }
}

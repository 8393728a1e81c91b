//! CRC-32C (Castagnoli) of headers: RFC 4960, appendix B.
//!
//! Called by `decode` and `encode`. One table lookup per byte: a header of 60 bytes takes about
//! 0.1 us.

use super::tlv;

/// Bytes of the checksum.
pub(super) const CRC_BYTES: usize = 4;

/// The polynomial with its bits reversed.
const POLYNOMIAL: u32 = 0x82f6_3b78;

const TABLE: [u32; 256] = table();

const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut value = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            value = if value & 1 == 1 { value >> 1 ^ POLYNOMIAL } else { value >> 1 };
            bit += 1;
        }
        table[byte] = value;
        byte += 1;
    }
    table
}

/// Returns the checksum of `header`, with the [`CRC_BYTES`] bytes at `field` taken as zero.
pub(super) fn of_header(header: &[u8], field: usize) -> u32 {
    let zeros = [0; CRC_BYTES];
    let parts = [&header[..field], &zeros, &header[field + CRC_BYTES..]];
    let step = |crc: u32, byte: &u8| TABLE[usize::from(crc as u8 ^ byte)] ^ crc >> 8;
    !parts.into_iter().flatten().fold(u32::MAX, step)
}

/// Appends a checksum entry to the complete header in `header`, whose length field already
/// counts it.
pub(super) fn append(header: &mut Vec<u8>) {
    header.extend([tlv::CRC32C, 0, CRC_BYTES as u8]);
    let field = header.len();
    header.extend([0; CRC_BYTES]);
    let crc = of_header(header, field);
    header[field..].copy_from_slice(&crc.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check value of CRC-32C in the catalogue of parametrised CRC algorithms.
    #[test]
    fn checksum_of_the_reference_text_is_the_reference_value() {
        let text = b"123456789";
        let crc = !text
            .iter()
            .fold(u32::MAX, |crc, byte| TABLE[usize::from(crc as u8 ^ byte)] ^ crc >> 8);
        assert_eq!(crc, 0xe306_9283);
    }
}

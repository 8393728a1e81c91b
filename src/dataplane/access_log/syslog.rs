//! Access-log lines as syslog messages, one message per line.
//!
//! Used by the writer thread as one of its targets. A call waits for the receiver for at most
//! `tidegate_logging::syslog::WAIT`.

use super::record::time_of;
use rustix::io::Errno;
use std::io;
use tidegate_logging::syslog::{SyslogAddress, SyslogConnection, SyslogHeader, SyslogSeverity};
use tidegate_net::clock;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct SyslogSink {
    address: SyslogAddress,
    header: SyslogHeader,
    connection: SyslogConnection,
}

// === impl SyslogSink ===

impl SyslogSink {
    pub(super) fn new(address: &SyslogAddress, header: &SyslogHeader) -> SyslogSink {
        SyslogSink {
            address: address.clone(),
            header: header.clone(),
            connection: SyslogConnection::new(address.clone(), clock::now),
        }
    }

    /// Sends the first line of `bytes`. Returns its length with the newline.
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let end = bytes.iter().position(|byte| *byte == b'\n');
        let line = &bytes[..end.unwrap_or(bytes.len())];
        let mut message = Vec::with_capacity(line.len() + 128);
        self.header.append(SyslogSeverity::Info, &time_of(line), &mut message);
        message.extend_from_slice(line);
        match self.connection.send(&message) {
            Ok(()) => Ok(line.len() + usize::from(end.is_some())),
            // The next line can be shorter.
            Err(error) if error.raw_os_error() == Some(Errno::MSGSIZE.raw_os_error()) => {
                tracing::warn!(bytes = message.len(), %error, "access-log line dropped");
                Ok(line.len() + usize::from(end.is_some()))
            }
            Err(error) => Err(error),
        }
    }

    pub(super) fn keeps_bytes(&mut self) -> bool {
        // An error is reported with the next line.
        let _ = self.connection.flush();
        self.connection.has_unsent()
    }

    pub(super) fn name(&self) -> String {
        match &self.address {
            SyslogAddress::Unix(path) => format!("syslog:{}", path.display()),
            SyslogAddress::Udp(to) => format!("syslog:udp:{to}"),
            SyslogAddress::Tcp(to) => format!("syslog:tcp:{to}"),
        }
    }
}

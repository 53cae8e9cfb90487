//! TLS on the lane: rustls turns bytes into bytes, the lane moves them. Certificates both ways (X.509), TLS 1.2 and 1.3.

use std::cell::{Cell, RefCell};
use std::io::{self, Read, Write};
use std::rc::Rc;
use std::sync::Arc;

use block::{Segments, SegmentsMut};
use lane::sync::Turn;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use crate::wire::Wire;

/// Bytes encrypted or decrypted at a time: some records of 16 KiB.
const PIECE_BYTES: usize = 64 << 10;

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// No PEM, or not with what was expected in it.
    #[error("the PEM of the {what} cannot be read: {source}")]
    Pem {
        /// Which one.
        what: &'static str,
        /// What is wrong.
        source: rustls::pki_types::pem::Error,
    },
    /// The certificates do not fit each other, or the key.
    #[error("the certificates do not work: {0}")]
    Rustls(#[from] rustls::Error),
    /// The authority for client certificates does not work.
    #[error("the authority for clients does not work: {0}")]
    Clients(#[from] rustls::server::VerifierBuilderError),
    /// No name that a certificate could have.
    #[error("{0:?} is no host name")]
    Name(String),
}

/// Whether clients of a listener must, may or cannot use TLS.
#[derive(Clone, Default)]
pub enum Tls {
    /// STARTTLS is answered with "not supported".
    #[default]
    Off,
    /// A client may encrypt.
    Optional(Identity),
    /// Before TLS nothing else is answered.
    Required(Identity),
}

impl Tls {
    pub(crate) fn identity(&self) -> Option<&Identity> {
        match self {
            Self::Off => None,
            Self::Optional(identity) | Self::Required(identity) => Some(identity),
        }
    }
}

/// What a server proves itself with, and what it demands of clients.
#[derive(Clone)]
pub struct Identity(Arc<ServerConfig>);

/// Whom a client trusts, and what it proves itself with.
#[derive(Clone)]
pub struct Trust {
    config: Arc<ClientConfig>,
    server: ServerName<'static>,
}

impl std::fmt::Debug for Trust {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Trust({:?})", self.server)
    }
}

fn certificates(pem: &[u8], what: &'static str) -> Result<Vec<CertificateDer<'static>>, CertificateError> {
    let list: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match list {
        Ok(list) if list.is_empty() => {
            Err(CertificateError::Pem { what, source: rustls::pki_types::pem::Error::NoItemsFound })
        }
        other => other.map_err(|source| CertificateError::Pem { what, source }),
    }
}

fn key(pem: &[u8]) -> Result<PrivateKeyDer<'static>, CertificateError> {
    PrivateKeyDer::from_pem_slice(pem).map_err(|source| CertificateError::Pem { what: "private key", source })
}

fn roots(pem: &[u8]) -> Result<RootCertStore, CertificateError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(pem, "authority")? {
        roots.add(certificate)?;
    }
    Ok(roots)
}

/// The one provider of this project, named at each use so that no second one can make it ambiguous.
fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

impl Identity {
    /// From PEM: the certificate with its chain, its key, and the authority that must have signed a client's
    /// certificate (none: clients need no certificate).
    pub fn from_pem(chain: &[u8], private: &[u8], clients: Option<&[u8]>) -> Result<Self, CertificateError> {
        let builder =
            ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
        let builder = match clients {
            None => builder.with_no_client_auth(),
            Some(pem) => builder.with_client_cert_verifier(
                WebPkiClientVerifier::builder_with_provider(Arc::new(roots(pem)?), provider()).build()?,
            ),
        };
        let config = builder.with_single_cert(certificates(chain, "certificate")?, key(private)?)?;
        Ok(Self(Arc::new(config)))
    }
}

impl Trust {
    /// From PEM: the authority that must have signed the server's certificate, which must be for `server` (a host
    /// name or IP address), and the client's own certificate and key, if it has any.
    pub fn from_pem(
        authority: &[u8],
        server: &str,
        own: Option<(&[u8], &[u8])>,
    ) -> Result<Self, CertificateError> {
        let builder = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots(authority)?);
        let config = match own {
            None => builder.with_no_client_auth(),
            Some((chain, private)) => {
                builder.with_client_auth_cert(certificates(chain, "certificate")?, key(private)?)?
            }
        };
        let name = ServerName::try_from(server.to_string())
            .map_err(|_| CertificateError::Name(server.to_string()))?;
        Ok(Self { config: Arc::new(config), server: name })
    }
}

/// An encrypted connection over another.
pub struct TlsWire {
    under: Rc<Wire>,
    session: RefCell<rustls::Connection>,
    /// Encrypted bytes leave in the order in which rustls made them.
    sending: Turn,
    /// Encrypted bytes that were received; taken out while more are.
    encrypted: Cell<Encrypted>,
}

/// Received and not decrypted yet: `bytes[start..end]`.
#[derive(Default)]
struct Encrypted {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

fn broken(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("TLS: {error}"))
}

impl TlsWire {
    /// Talks the server's half of the TLS handshake.
    pub(crate) async fn accept(under: Rc<Wire>, identity: &Identity) -> io::Result<Self> {
        let session = rustls::ServerConnection::new(Arc::clone(&identity.0)).map_err(broken)?;
        Self::begin(under, session.into()).await
    }

    /// Talks the client's half of the TLS handshake.
    pub(crate) async fn connect(under: Rc<Wire>, trust: &Trust) -> io::Result<Self> {
        let session = rustls::ClientConnection::new(Arc::clone(&trust.config), trust.server.clone());
        Self::begin(under, session.map_err(broken)?.into()).await
    }

    async fn begin(under: Rc<Wire>, session: rustls::Connection) -> io::Result<Self> {
        let wire = Self {
            under,
            session: RefCell::new(session),
            sending: Turn::new(),
            encrypted: Cell::new(Encrypted { bytes: vec![0; PIECE_BYTES], start: 0, end: 0 }),
        };
        loop {
            wire.send_made().await?;
            if !wire.session.borrow().is_handshaking() {
                return Ok(wire);
            }
            if !wire.take_in().await? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// Sends what rustls has made.
    async fn send_made(&self) -> io::Result<()> {
        if !self.session.borrow().wants_write() {
            return Ok(());
        }
        let _turn = self.sending.take().await;
        self.send_made_in_turn().await
    }

    async fn send_made_in_turn(&self) -> io::Result<()> {
        let mut made = Vec::new();
        {
            let mut session = self.session.borrow_mut();
            while session.wants_write() {
                session.write_tls(&mut made)?;
            }
        }
        if made.is_empty() { Ok(()) } else { self.under.send(&Segments::new(&made)).await }
    }

    /// Decrypts some of what was received, and receives if there is nothing; false at the end of the connection.
    async fn take_in(&self) -> io::Result<bool> {
        let mut encrypted = self.encrypted.take();
        if encrypted.start == encrypted.end {
            let received = self.under.receive(&SegmentsMut::new(&mut encrypted.bytes)).await;
            (encrypted.start, encrypted.end) = (0, *received.as_ref().unwrap_or(&0));
            if encrypted.end == 0 {
                self.encrypted.set(encrypted);
                return received.map(|_| false);
            }
        }
        let result = self.decrypt(&mut encrypted);
        self.encrypted.set(encrypted);
        if result.is_err() {
            let _ = self.send_made().await; // the alert, if there is still somebody to hear it
        }
        result.map(|()| true)
    }

    /// One step: rustls takes as much as it has room for, and its plain text is to be read before the next.
    fn decrypt(&self, encrypted: &mut Encrypted) -> io::Result<()> {
        let mut session = self.session.borrow_mut();
        let mut bytes = &encrypted.bytes[encrypted.start..encrypted.end];
        encrypted.start += session.read_tls(&mut bytes)?;
        session.process_new_packets().map_err(broken)?;
        Ok(())
    }

    /// See [`Wire::receive`].
    pub(crate) async fn receive(&self, into: &SegmentsMut<'_>) -> io::Result<usize> {
        let mut plain = vec![0; into.len().min(PIECE_BYTES)];
        loop {
            let read = self.session.borrow_mut().reader().read(&mut plain);
            match read {
                Ok(count) => {
                    into.copy_from(0, &plain[..count]);
                    return Ok(count); // 0: the peer has said good-bye
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // The connection ended without a good-bye: what is missing, the caller sees by itself.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                Err(error) => return Err(error),
            }
            if !self.take_in().await? {
                return Ok(0);
            }
            self.send_made().await?;
        }
    }

    /// See [`Wire::send`].
    pub(crate) async fn send(&self, from: &Segments<'_>) -> io::Result<()> {
        let _turn = self.sending.take().await;
        let mut plain = vec![0; from.len().min(PIECE_BYTES)];
        let mut done = 0;
        while done < from.len() {
            let wanted = (from.len() - done).min(PIECE_BYTES);
            from.copy_to(done, &mut plain[..wanted]);
            done += self.session.borrow_mut().writer().write(&plain[..wanted])?;
            self.send_made_in_turn().await?;
        }
        Ok(())
    }

    /// Tells the peer that nothing more will come.
    pub(crate) async fn say_goodbye(&self) -> io::Result<()> {
        self.session.borrow_mut().send_close_notify();
        self.send_made().await
    }

    /// See [`Wire::shut`].
    pub(crate) fn shut(&self) {
        self.under.shut();
    }
}

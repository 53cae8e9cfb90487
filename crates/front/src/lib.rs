//! Wire protocols to requests.
//!
//! A front end turns what a client sends into calls on a [`block::Disk`], and every client request into exactly one
//! answer: [`request::Request`] is that obligation. NBD is here ([`nbd`]), iSCSI ([`iscsi`]), and vhost-user-blk ([`vhost`]).

pub mod iscsi;
pub mod nbd;
pub mod request;
pub mod vhost;

mod credit;
mod doors;
mod pool;
mod tls;
mod wire;

//! The genuine images can be had and are what the format page says.

mod common;

use block::{Disk, Sector, SegmentsMut};

#[test]
fn the_helper_loads_a_genuine_volume() {
    let Some(disk) = common::genuine::disk("vmfs/vmfs5-no-dense-sbpc") else { return };
    assert_eq!(disk.shape().bytes(), 2_181_038_592);
    let mut sector = [0; 512];
    let into = SegmentsMut::new(&mut sector);
    common::at_once(async { disk.read(Sector::at_byte(0x100000), &into).await.unwrap() });
    assert_eq!(sector[..4], [0x0D, 0xD0, 0x01, 0xC0]);
}

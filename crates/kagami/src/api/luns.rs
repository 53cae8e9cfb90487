//! Pools, LUNs, snapshots, clones, groups.

use axum::Json;
use axum::extract::{Path, State};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::{Body, Change, Dry, Query, Shared};
use crate::model::{
    CheckView, GroupCutView, ImportPool, LunView, NewClone, NewGroupCut, NewLun, NewPool, NewSnap, PoolView,
    Removal, ResizeLun, ResolveGroup, RevertSnap, SnapView,
};
use crate::problem::{Outcome, Problem};

/// Routes of this file.
pub fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new()
        .routes(routes!(list_pools, create_pool))
        .routes(routes!(show_pool, remove_pool))
        .routes(routes!(import_pool))
        .routes(routes!(check_pool))
        .routes(routes!(reopen_pool))
        .routes(routes!(list_luns, create_lun))
        .routes(routes!(show_lun, resize_lun, remove_lun))
        .routes(routes!(undelete_lun))
        .routes(routes!(undo_revert))
        .routes(routes!(list_snaps, create_snap))
        .routes(routes!(remove_snap))
        .routes(routes!(revert_snap))
        .routes(routes!(create_clone))
        .routes(routes!(list_group_cuts, create_group_cut))
        .routes(routes!(resolve_groups))
}

/// Which LUNs.
#[derive(Debug, serde::Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
struct Which {
    /// Those in the trash.
    #[serde(default)]
    trash: bool,
}

/// Of which LUN.
#[derive(Debug, serde::Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
struct Of {
    /// Name, UUID or naa. identity.
    lun: Option<String>,
}

/// How to check.
#[derive(Debug, serde::Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
struct HowToCheck {
    /// Give leaks back.
    #[serde(default)]
    repair: bool,
}

/// All pools.
#[utoipa::path(get, path = "/api/v1/pools", responses((status = 200, body = Vec<PoolView>), (status = "default", body = Problem)))]
async fn list_pools(State(daemon): State<Shared>) -> Outcome<Json<Vec<PoolView>>> {
    daemon.store.ask(move |store| async move { store.pools().await }).await.map(Json)
}

/// Makes a pool.
#[utoipa::path(post, path = "/api/v1/pools", request_body = NewPool, params(Dry), responses((status = 200, body = PoolView), (status = "default", body = Problem)))]
async fn create_pool(
    State(daemon): State<Shared>,
    Query(dry): Query<Dry>,
    Body(new): Body<NewPool>,
) -> Outcome<Change<PoolView>> {
    daemon.store.ask(move |store| async move { store.create_pool(new, dry.dry_run).await }).await
}

/// One pool.
#[utoipa::path(get, path = "/api/v1/pools/{name}", params(("name" = String, Path)), responses((status = 200, body = PoolView), (status = "default", body = Problem)))]
async fn show_pool(State(daemon): State<Shared>, Path(name): Path<String>) -> Outcome<Json<PoolView>> {
    daemon.store.ask(move |store| async move { store.show_pool(&name).await }).await.map(Json)
}

/// Brings a pool to this home.
#[utoipa::path(post, path = "/api/v1/pools/import", request_body = ImportPool, params(Dry), responses((status = 200, body = PoolView), (status = "default", body = Problem)))]
async fn import_pool(
    State(daemon): State<Shared>,
    Query(dry): Query<Dry>,
    Body(new): Body<ImportPool>,
) -> Outcome<Change<PoolView>> {
    daemon.store.ask(move |store| async move { store.import_pool(new, dry.dry_run).await }).await
}

/// Checks a pool's metadata, and gives leaks back if that is wanted.
#[utoipa::path(post, path = "/api/v1/pools/{name}/check", params(("name" = String, Path), HowToCheck), responses((status = 200, body = CheckView), (status = "default", body = Problem)))]
async fn check_pool(
    State(daemon): State<Shared>,
    Path(name): Path<String>,
    Query(how): Query<HowToCheck>,
) -> Outcome<Json<CheckView>> {
    daemon.store.ask(move |store| async move { store.check_pool(&name, how.repair).await }).await.map(Json)
}

/// Opens a pool again after a failed flush.
#[utoipa::path(post, path = "/api/v1/pools/{name}/reopen", params(("name" = String, Path), Dry), responses((status = 200, body = PoolView), (status = "default", body = Problem)))]
async fn reopen_pool(
    State(daemon): State<Shared>,
    Path(name): Path<String>,
    Query(dry): Query<Dry>,
) -> Outcome<Change<PoolView>> {
    daemon.store.ask(move |store| async move { store.reopen_pool(&name, dry.dry_run).await }).await
}

/// All LUNs, or those in the trash.
#[utoipa::path(get, path = "/api/v1/luns", params(Which), responses((status = 200, body = Vec<LunView>), (status = "default", body = Problem)))]
async fn list_luns(State(daemon): State<Shared>, Query(which): Query<Which>) -> Outcome<Json<Vec<LunView>>> {
    daemon.store.ask(move |store| async move { store.luns(which.trash).await }).await.map(Json)
}

/// Makes a LUN.
#[utoipa::path(post, path = "/api/v1/luns", request_body = NewLun, params(Dry), responses((status = 200, body = LunView), (status = "default", body = Problem)))]
async fn create_lun(
    State(daemon): State<Shared>,
    Query(dry): Query<Dry>,
    Body(new): Body<NewLun>,
) -> Outcome<Change<LunView>> {
    daemon.store.ask(move |store| async move { store.create_lun(new, dry.dry_run).await }).await
}

/// One LUN, by name, UUID or naa. identity.
#[utoipa::path(get, path = "/api/v1/luns/{lun}", params(("lun" = String, Path)), responses((status = 200, body = LunView), (status = "default", body = Problem)))]
async fn show_lun(State(daemon): State<Shared>, Path(lun): Path<String>) -> Outcome<Json<LunView>> {
    daemon.store.ask(move |store| async move { store.show_lun(&lun).await }).await.map(Json)
}

/// Grows a LUN.
#[utoipa::path(patch, path = "/api/v1/luns/{lun}", request_body = ResizeLun, params(("lun" = String, Path), Dry), responses((status = 200, body = LunView), (status = "default", body = Problem)))]
async fn resize_lun(
    State(daemon): State<Shared>,
    Path(lun): Path<String>,
    Query(dry): Query<Dry>,
    Body(new): Body<ResizeLun>,
) -> Outcome<Change<LunView>> {
    daemon
        .store
        .ask(move |store| async move { store.resize_lun(&lun, new.size_bytes, dry.dry_run).await })
        .await
}

/// Removes a LUN: into the trash, or at once with `all`.
#[utoipa::path(delete, path = "/api/v1/luns/{lun}", params(("lun" = String, Path), Removal), responses((status = 200, body = LunView), (status = "default", body = Problem)))]
async fn remove_lun(
    State(daemon): State<Shared>,
    Path(lun): Path<String>,
    Query(removal): Query<Removal>,
) -> Outcome<Change<LunView>> {
    daemon.store.ask(move |store| async move { store.remove_lun(&lun, removal).await }).await
}

/// Takes a LUN out of the trash.
#[utoipa::path(post, path = "/api/v1/luns/{lun}/undelete", params(("lun" = String, Path), Dry), responses((status = 200, body = LunView), (status = "default", body = Problem)))]
async fn undelete_lun(
    State(daemon): State<Shared>,
    Path(lun): Path<String>,
    Query(dry): Query<Dry>,
) -> Outcome<Change<LunView>> {
    daemon.store.ask(move |store| async move { store.undelete_lun(&lun, dry.dry_run).await }).await
}

/// Returns to what a LUN held before it was reverted.
#[utoipa::path(post, path = "/api/v1/luns/{lun}/undo-revert", params(("lun" = String, Path), Dry), responses((status = 200, body = LunView), (status = "default", body = Problem)))]
async fn undo_revert(
    State(daemon): State<Shared>,
    Path(lun): Path<String>,
    Query(dry): Query<Dry>,
) -> Outcome<Change<LunView>> {
    daemon.store.ask(move |store| async move { store.undo_revert(&lun, dry.dry_run).await }).await
}

/// Takes a pool out of this home; its files stay.
#[utoipa::path(delete, path = "/api/v1/pools/{name}", params(("name" = String, Path), Removal), responses((status = 200, body = PoolView), (status = "default", body = Problem)))]
async fn remove_pool(
    State(daemon): State<Shared>,
    Path(name): Path<String>,
    Query(removal): Query<Removal>,
) -> Outcome<Change<PoolView>> {
    daemon.store.ask(move |store| async move { store.remove_pool(&name, removal).await }).await
}

/// Ends cuts over several pools that are in doubt.
#[utoipa::path(post, path = "/api/v1/groups/resolve", request_body = ResolveGroup, params(Dry), responses((status = 200, body = Vec<GroupCutView>), (status = "default", body = Problem)))]
async fn resolve_groups(
    State(daemon): State<Shared>,
    Query(dry): Query<Dry>,
    Body(new): Body<ResolveGroup>,
) -> Outcome<Change<Vec<GroupCutView>>> {
    daemon.store.ask(move |store| async move { store.resolve_groups(new, dry.dry_run).await }).await
}

/// All snapshots, or those of one LUN.
#[utoipa::path(get, path = "/api/v1/snaps", params(Of), responses((status = 200, body = Vec<SnapView>), (status = "default", body = Problem)))]
async fn list_snaps(State(daemon): State<Shared>, Query(of): Query<Of>) -> Outcome<Json<Vec<SnapView>>> {
    daemon.store.ask(move |store| async move { store.snaps(of.lun).await }).await.map(Json)
}

/// Takes a snapshot.
#[utoipa::path(post, path = "/api/v1/snaps", request_body = NewSnap, params(Dry), responses((status = 200, body = SnapView), (status = "default", body = Problem)))]
async fn create_snap(
    State(daemon): State<Shared>,
    Query(dry): Query<Dry>,
    Body(new): Body<NewSnap>,
) -> Outcome<Change<SnapView>> {
    daemon.store.ask(move |store| async move { store.create_snap(new, dry.dry_run).await }).await
}

/// Removes a snapshot, `lun@snap`.
#[utoipa::path(delete, path = "/api/v1/snaps/{snap}", params(("snap" = String, Path), Removal), responses((status = 200, body = SnapView), (status = "default", body = Problem)))]
async fn remove_snap(
    State(daemon): State<Shared>,
    Path(snap): Path<String>,
    Query(removal): Query<Removal>,
) -> Outcome<Change<SnapView>> {
    daemon.store.ask(move |store| async move { store.remove_snap(&snap, removal).await }).await
}

/// Sets a LUN back to a snapshot.
#[utoipa::path(post, path = "/api/v1/snaps/{snap}/revert", request_body = RevertSnap, params(("snap" = String, Path), Dry), responses((status = 200, body = LunView), (status = "default", body = Problem)))]
async fn revert_snap(
    State(daemon): State<Shared>,
    Path(snap): Path<String>,
    Query(dry): Query<Dry>,
    Body(new): Body<RevertSnap>,
) -> Outcome<Change<LunView>> {
    daemon
        .store
        .ask(move |store| async move { store.revert_snap(&snap, new.accept, dry.dry_run).await })
        .await
}

/// Makes a writable LUN from a snapshot.
#[utoipa::path(post, path = "/api/v1/clones", request_body = NewClone, params(Dry), responses((status = 200, body = LunView), (status = "default", body = Problem)))]
async fn create_clone(
    State(daemon): State<Shared>,
    Query(dry): Query<Dry>,
    Body(new): Body<NewClone>,
) -> Outcome<Change<LunView>> {
    daemon.store.ask(move |store| async move { store.create_clone(new, dry.dry_run).await }).await
}

/// All group cuts.
#[utoipa::path(get, path = "/api/v1/groups", responses((status = 200, body = Vec<GroupCutView>), (status = "default", body = Problem)))]
async fn list_group_cuts(State(daemon): State<Shared>) -> Outcome<Json<Vec<GroupCutView>>> {
    daemon.store.ask(move |store| async move { store.group_cuts().await }).await.map(Json)
}

/// Cuts several LUNs at one instant.
#[utoipa::path(post, path = "/api/v1/groups", request_body = NewGroupCut, params(Dry), responses((status = 200, body = GroupCutView), (status = "default", body = Problem)))]
async fn create_group_cut(
    State(daemon): State<Shared>,
    Query(dry): Query<Dry>,
    Body(new): Body<NewGroupCut>,
) -> Outcome<Change<GroupCutView>> {
    daemon.store.ask(move |store| async move { store.create_group_cut(new, dry.dry_run).await }).await
}

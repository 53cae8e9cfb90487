//! Jobs: backup, restore and what undoes it. 202 with the job's address; the job says how far it is.

use std::time::Duration;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::{Body, Change, Dry, Query, Shared};
use crate::jobs::Work;
use crate::model::{JobView, LunView, NewBackup, NewRestore, Plan, ReleaseHold, UndoRestore};
use crate::problem::{Outcome, Problem};

/// Routes of this file.
pub fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new()
        .routes(routes!(create_backup))
        .routes(routes!(create_restore))
        .routes(routes!(undo_restore))
        .routes(routes!(accept_restore))
        .routes(routes!(release_hold))
        .routes(routes!(list_jobs))
        .routes(routes!(show_job))
        .routes(routes!(cancel_job))
}

/// Longest time that a request waits for a job.
const LONGEST_WAIT: u64 = 60;

fn accepted(job: JobView) -> Response {
    let location = format!("/api/v1/jobs/{}", job.id);
    (StatusCode::ACCEPTED, [(header::LOCATION, location)], Json(job)).into_response()
}

/// Backs a VM up.
#[utoipa::path(post, path = "/api/v1/backups", request_body = NewBackup, params(Dry),
    responses((status = 202, body = JobView), (status = "default", body = Problem)))]
async fn create_backup(
    State(daemon): State<Shared>,
    Query(dry): Query<Dry>,
    Body(new): Body<NewBackup>,
) -> Outcome<Response> {
    let asked = new.clone();
    let plan: Plan = daemon.store.ask(move |store| async move { store.plan_backup(&asked).await }).await?;
    if dry.dry_run {
        return Ok(Change::<()>::Would(plan).into_response());
    }
    daemon.jobs.begin(Work::Backup(new)).map(accepted)
}

/// Restores a backup.
#[utoipa::path(post, path = "/api/v1/restores", request_body = NewRestore, params(Dry),
    responses((status = 202, body = JobView), (status = "default", body = Problem)))]
async fn create_restore(
    State(daemon): State<Shared>,
    Query(dry): Query<Dry>,
    Body(new): Body<NewRestore>,
) -> Outcome<Response> {
    let asked = new.clone();
    let plan: Plan = daemon.store.ask(move |store| async move { store.plan_restore(&asked).await }).await?;
    if dry.dry_run {
        return Ok(Change::<()>::Would(plan).into_response());
    }
    daemon.jobs.begin(Work::Restore(new)).map(accepted)
}

/// Brings back what a VM held before the latest restore over it.
#[utoipa::path(post, path = "/api/v1/restores/undo", request_body = UndoRestore, params(Dry),
    responses((status = 202, body = JobView), (status = "default", body = Problem)))]
async fn undo_restore(
    State(daemon): State<Shared>,
    Query(dry): Query<Dry>,
    Body(new): Body<UndoRestore>,
) -> Outcome<Response> {
    let vm = new.vm.clone();
    let plan: Plan = daemon.store.ask(move |store| async move { store.plan_undo(&vm).await }).await?;
    if dry.dry_run {
        return Ok(Change::<()>::Would(plan).into_response());
    }
    daemon.jobs.begin(Work::UndoRestore(new)).map(accepted)
}

/// Gives up what a VM held before the latest restore over it.
#[utoipa::path(post, path = "/api/v1/restores/accept", request_body = UndoRestore, params(Dry),
    responses((status = 200, body = Plan), (status = "default", body = Problem)))]
async fn accept_restore(
    State(daemon): State<Shared>,
    Query(dry): Query<Dry>,
    Body(new): Body<UndoRestore>,
) -> Outcome<Json<Plan>> {
    daemon
        .store
        .ask(move |store| async move { store.accept_in_place(&new.vm, dry.dry_run).await })
        .await
        .map(Json)
}

/// Lets go what a holder keeps of a LUN's past.
#[utoipa::path(post, path = "/api/v1/luns/{lun}/release", request_body = ReleaseHold,
    params(("lun" = String, Path), Dry),
    responses((status = 200, body = LunView), (status = "default", body = Problem)))]
async fn release_hold(
    State(daemon): State<Shared>,
    Path(lun): Path<String>,
    Query(dry): Query<Dry>,
    Body(new): Body<ReleaseHold>,
) -> Outcome<Change<LunView>> {
    daemon.store.ask(move |store| async move { store.release_holder(&lun, new, dry.dry_run).await }).await
}

/// All jobs, oldest first.
#[utoipa::path(get, path = "/api/v1/jobs", responses((status = 200, body = Vec<JobView>)))]
async fn list_jobs(State(daemon): State<Shared>) -> Json<Vec<JobView>> {
    Json(daemon.jobs.list())
}

/// How long to wait.
#[derive(Debug, serde::Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
struct Wait {
    /// Wait up to so many seconds (at most 60) for the job to end.
    #[serde(default)]
    wait_seconds: u64,
}

/// One job, by the beginning of its id.
#[utoipa::path(get, path = "/api/v1/jobs/{id}", params(("id" = String, Path), Wait),
    responses((status = 200, body = JobView), (status = "default", body = Problem)))]
async fn show_job(
    State(daemon): State<Shared>,
    Path(id): Path<String>,
    Query(wait): Query<Wait>,
) -> Outcome<Json<JobView>> {
    match wait.wait_seconds.min(LONGEST_WAIT) {
        0 => daemon.jobs.show(&id).map(Json),
        seconds => daemon.jobs.wait(&id, Duration::from_secs(seconds)).await.map(Json),
    }
}

/// Asks a job to end early.
#[utoipa::path(post, path = "/api/v1/jobs/{id}/cancel", params(("id" = String, Path)),
    responses((status = 200, body = JobView), (status = "default", body = Problem)))]
async fn cancel_job(State(daemon): State<Shared>, Path(id): Path<String>) -> Outcome<Json<JobView>> {
    daemon.jobs.cancel(&id).map(Json)
}

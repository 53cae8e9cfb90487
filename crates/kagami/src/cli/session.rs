//! One command's dealings with the daemon: asking first where something is lost, dry runs, waiting for jobs.

use std::io::{BufRead, IsTerminal, Write};
use std::time::Duration;

use hyper::Method;
use serde_json::Value;

use crate::cli::args::Global;
use crate::cli::client::{Client, segment};
use crate::home::Home;
use crate::model::Plan;
use crate::output::{Column, Output};
use crate::problem::{Kind, Outcome, Problem};
use crate::units::show_size;

/// A command's connection, options and output.
pub struct Session {
    client: Client,
    global: Global,
    /// Where data goes.
    pub out: Output,
}

/// How output goes with these options.
pub fn output(global: &Global) -> Output {
    Output {
        format: global.output,
        quiet: global.quiet,
        color: global.color,
        no_progress: global.no_progress,
    }
}

/// A write to stdout failed.
pub fn stdout_failed(error: std::io::Error) -> Problem {
    Problem::failed("KGM-CLI-0012", "cannot write to stdout", error)
}

impl Session {
    /// With the daemon of the home; it is reached, or started where that is allowed, at the first request.
    pub fn open(global: &Global) -> Outcome<Self> {
        let client = Client::new(Home::find(global.home.as_deref())?);
        Ok(Self { client, global: global.clone(), out: output(global) })
    }

    /// GETs an object.
    pub async fn get(&self, path: &str) -> Outcome<Value> {
        self.client.get(path).await
    }

    /// Any request, and its answer.
    pub async fn send(&self, method: Method, path: &str, body: Option<Value>) -> Outcome<Value> {
        self.client.send(method, path, body).await
    }

    /// Only say what would be done.
    pub fn is_dry_run(&self) -> bool {
        self.global.dry_run
    }

    /// Output is a table, not for programs.
    pub fn for_people(&self) -> bool {
        matches!(self.out.format, crate::output::Format::Table | crate::output::Format::Wide)
            && !self.out.quiet
    }

    /// GETs and prints a list.
    pub async fn list(&self, path: &str, columns: &[Column]) -> Outcome {
        let rows = self.client.get(path).await?;
        self.print_list(&rows, columns)
    }

    /// Prints a list that was got.
    pub fn print_list(&self, rows: &Value, columns: &[Column]) -> Outcome {
        self.out.list(rows.as_array().map_or(&[], Vec::as_slice), columns).map_err(stdout_failed)
    }

    /// GETs and prints one object.
    pub async fn show(&self, path: &str, columns: &[Column]) -> Outcome {
        let object = self.client.get(path).await?;
        self.print(&object, columns)
    }

    /// Prints an object that was got.
    pub fn print(&self, object: &Value, columns: &[Column]) -> Outcome {
        self.out.object(object, columns).map_err(stdout_failed)
    }

    /// A change that loses nothing, and its answer; `None` after a dry run.
    pub async fn change(&self, method: Method, path: &str, body: Option<Value>) -> Outcome<Option<Value>> {
        if self.global.dry_run {
            self.print_plan(&self.plan(method, path, body).await?)?;
            return Ok(None);
        }
        self.client.send(method, path, body).await.map(Some)
    }

    /// A change, and its printed answer.
    pub async fn change_and_print(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
        columns: &[Column],
    ) -> Outcome {
        match self.change(method, path, body).await? {
            Some(object) => self.print(&object, columns),
            None => Ok(()),
        }
    }

    /// A change that destroys something: says what is lost and asks for the name; without a terminal it needs `--yes`.
    pub async fn destroy(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
        noun: &str,
        name: &str,
    ) -> Outcome {
        if let Some((plan, _)) = self.confirmed(method, path, body, noun, name).await? {
            eprintln!("{} {noun} {name}", past(&plan));
        }
        Ok(())
    }

    /// As [`Session::destroy`], and the answer with what was planned; `None` after a dry run.
    pub async fn confirmed(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
        noun: &str,
        name: &str,
    ) -> Outcome<Option<(Plan, Value)>> {
        let plan = self.plan(method.clone(), path, body.clone()).await?;
        if self.global.dry_run {
            return self.print_plan(&plan).map(|()| None);
        }
        if !self.global.yes && !plan.loses.is_empty() {
            confirm_loss(&plan.loses, plan.frees_bytes, noun, name)?;
        }
        let answer = self.client.send(method, path, body).await?;
        Ok(Some((plan, answer)))
    }

    async fn plan(&self, method: Method, path: &str, body: Option<Value>) -> Outcome<Plan> {
        let joint = if path.contains('?') { '&' } else { '?' };
        let plan = self.client.send(method, &format!("{path}{joint}dry_run=true"), body).await?;
        if plan.get("would").is_none() {
            // The object itself: it is as it should be.
            return Ok(Plan { would: vec!["change nothing: it is so already".into()], ..Plan::default() });
        }
        serde_json::from_value(plan)
            .map_err(|e| Problem::failed("KGM-CLI-0013", "the plan was not understood", e))
    }

    fn print_plan(&self, plan: &Plan) -> Outcome {
        let mut text: Vec<String> = plan.would.iter().map(|step| format!("would {step}")).collect();
        text.extend(plan.loses.iter().map(|loss| format!("  loses {loss}")));
        if plan.frees_bytes > 0 {
            text.push(format!("  frees {}", show_size(plan.frees_bytes)));
        }
        let object = serde_json::to_value(plan).unwrap_or_default(); // plain data always serialises
        match self.out.format {
            crate::output::Format::Json | crate::output::Format::Jsonl => self.print(&object, &[]),
            _ => writeln!(std::io::stdout(), "{}", text.join("\n")).map_err(stdout_failed),
        }
    }

    /// Begins a job and waits for it, showing how far it is; `None` after a dry run or with `detach`.
    pub async fn job(&self, path: &str, body: Value, detach: bool) -> Outcome<Option<Value>> {
        let Some(job) = self.change(Method::POST, path, Some(body)).await? else { return Ok(None) };
        let id = job.get("id").and_then(Value::as_str).unwrap_or_default().to_owned();
        if detach {
            writeln!(std::io::stdout(), "{id}").map_err(stdout_failed)?;
            return Ok(None);
        }
        self.follow(&id).await.map(Some)
    }

    /// Waits for a job; its result. SIGUSR1 prints how far it is.
    pub async fn follow(&self, id: &str) -> Outcome<Value> {
        let bar = self.out.progress().then(progress_bar);
        let mut asked = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::user_defined1())
            .map_err(|e| Problem::failed("KGM-CLI-0014", "cannot listen to signals", e))?;
        let path = format!("/api/v1/jobs/{}", segment(id));
        let waiting = format!("{path}?wait_seconds=5");
        loop {
            let look = if bar.is_some() { &path } else { &waiting };
            let mut print = false;
            let job = tokio::select! {
                job = self.client.get(look) => job?,
                _ = asked.recv() => { print = true; self.client.get(&path).await? }
            };
            let text = |name: &str| job.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
            let number = |name: &str| job.get(name).and_then(Value::as_u64).unwrap_or(0);
            let (done, total) = (number("done_bytes"), number("total_bytes"));
            if print {
                eprintln!("{} {}: {} of {}", text("kind"), text("phase"), show_size(done), show_size(total));
            }
            if let Some(bar) = &bar {
                bar.set_length(total);
                bar.set_position(done);
                bar.set_message(text("phase"));
            }
            if text("state") != "running" {
                if let Some(bar) = &bar {
                    bar.finish_and_clear();
                }
                return ended(&job);
            }
            if bar.is_some() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

fn ended(job: &Value) -> Outcome<Value> {
    match job.get("problem").filter(|p| !p.is_null()) {
        Some(problem) => Err(serde_json::from_value(problem.clone())
            .unwrap_or_else(|e| Problem::failed("KGM-CLI-0013", "the job failed", e))),
        None => Ok(job.get("result").cloned().unwrap_or_default()),
    }
}

/// A bar of bytes with pace and time left, on stderr.
pub fn progress_bar() -> indicatif::ProgressBar {
    let bar = indicatif::ProgressBar::new(0);
    let shape = "{msg:24} [{bar:30}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta} left";
    if let Ok(style) = indicatif::ProgressStyle::with_template(shape) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

fn past(plan: &Plan) -> &'static str {
    let first = plan.would.first().map_or("", String::as_str);
    match first.split(' ').next() {
        Some("remove") => "removed",
        Some("revert") => "reverted",
        Some("stop") => "stopped",
        Some("unregister") => "unregistered",
        Some("take") => "taken out:",
        Some("accept") => "accepted",
        Some("resolve") => "resolved",
        Some("remap") => "remapped",
        _ => "changed",
    }
}

/// Says what is lost and asks for the name on the terminal; without a terminal that is a refusal.
pub fn confirm_loss(loses: &[String], frees_bytes: u64, noun: &str, name: &str) -> Outcome {
    let refused =
        Problem::new("KGM-CLI-0005", Kind::Refused, format!("nothing was done to {noun} \"{name}\""));
    if !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
        return Err(refused
            .why(format!("this loses {}, and there is no terminal to ask on", loses.join("; ")))
            .hint("say --yes to do it, --dry-run to see what it would do"));
    }
    for loss in loses {
        eprintln!("this loses {loss}");
    }
    if frees_bytes > 0 {
        eprintln!("it frees {}", show_size(frees_bytes));
    }
    eprint!("type the name of the {noun} to go on: ");
    let mut answer = String::new();
    let read = std::io::stdin().lock().read_line(&mut answer);
    if read.is_ok() && answer.trim() == name {
        return Ok(());
    }
    Err(refused.why("another name was typed"))
}

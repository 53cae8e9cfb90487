//! The command line: what was typed becomes requests to the daemon, or work on files without it.

pub mod args;
mod args_daemon;
mod args_images;
pub mod backups;
mod client;
mod columns;
pub mod images;
mod nouns;
mod old_names;
mod pool_image;
mod session;

use std::io::IsTerminal;

use clap::{CommandFactory, Parser};

use args::{Cli, ConfigVerb, Noun, ServeArgs};
pub use client::{Client, from_segment, segment};
use hyper::Method;
pub use nouns::absolute;
pub use session::{Session, output, stdout_failed};

use crate::config::{Config, Serving};
use crate::daemon::{self, HomeLock};
use crate::home::Home;
use crate::problem::{Kind, Outcome, Problem};

/// Runs the command that was typed; its exit code.
pub fn main() -> u8 {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print(); // there is nowhere else to say it
            let code = u8::try_from(error.exit_code()).unwrap_or(2);
            return if code == 2 && checks(&std::env::args().collect::<Vec<_>>()) { 1 } else { code };
        }
    };
    match run(&cli) {
        Ok(code) => code,
        Err(problem) => {
            let colored = output(&cli.global).colored(std::io::stderr().is_terminal());
            let (on, off) = if colored { ("\x1b[1;31m", "\x1b[0m") } else { ("", "") };
            eprintln!("{on}kagami:{off} {}", problem.lines());
            code_of(&cli, &problem)
        }
    }
}

/// For `check` and `verify` every failure to check is 1, usage errors too: 2 means corrupt there.
fn code_of(cli: &Cli, problem: &Problem) -> u8 {
    use args::{BackupVerb, DatastoreVerb, PoolVerb};
    let checks = matches!(
        &cli.noun,
        Noun::Pool(PoolVerb::Check { .. })
            | Noun::Datastore(DatastoreVerb::Check { .. })
            | Noun::Backup(BackupVerb::Verify { .. })
            | Noun::Vmfs(args_images::VmfsVerb::Check { .. })
    );
    match (checks, problem.kind) {
        (true, Kind::Corrupt) => 2,
        (true, _) => 1,
        (false, kind) => kind.exit_code(),
    }
}

/// The words typed are a checking command that was not understood.
fn checks(words: &[String]) -> bool {
    words
        .iter()
        .skip(1)
        .filter(|w| !w.starts_with('-'))
        .nth(1)
        .is_some_and(|verb| verb == "check" || verb == "verify")
}

fn run(cli: &Cli) -> Outcome<u8> {
    match &cli.noun {
        Noun::Completions { shell } => {
            clap_complete::generate(*shell, &mut Cli::command(), "kagami", &mut std::io::stdout());
            Ok(0)
        }
        Noun::Man { directory } => man(directory.as_deref()).map(|()| 0),
        Noun::Serve(args) => serve(cli, args).map(|()| 0),
        Noun::Config(verb) => config(cli, verb).map(|()| 0),
        Noun::Vmfs(_) | Noun::Vmdk(_) | Noun::Inspect(_) => images::run(&cli.global, &cli.noun),
        Noun::QuickstartWriter(args) => crate::quickstart::writer(args).map(|()| 0),
        noun => {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(|e| Problem::failed("KGM-CLI-0015", "the command cannot start", e))?;
            runtime.block_on(nouns::run(&cli.global, noun))
        }
    }
}

fn man(directory: Option<&std::path::Path>) -> Outcome {
    let failed = |e: std::io::Error| Problem::failed("KGM-CLI-0016", "cannot write the manual pages", e);
    match directory {
        Some(directory) => {
            std::fs::create_dir_all(directory).map_err(failed)?;
            clap_mangen::generate_to(Cli::command(), directory).map_err(failed)
        }
        None => clap_mangen::Man::new(Cli::command()).render(&mut std::io::stdout()).map_err(failed),
    }
}

fn serve(cli: &Cli, args: &ServeArgs) -> Outcome {
    let home = Home::find(cli.global.home.as_deref())?;
    if args.stop || args.status {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| Problem::failed("KGM-CLI-0015", "the command cannot start", e))?;
        return runtime
            .block_on(async { if args.stop { stop(&home).await } else { status(cli, &home).await } });
    }
    let (mut config, _) = Config::load(&home, args.config.as_deref())?;
    if let Some(text) = &args.nbd_tcp {
        let address = text.parse().map_err(|e| {
            Problem::usage(format!("\"{text}\" is no address")).why(e).hint("--nbd-tcp 127.0.0.1:10809")
        })?;
        config.nbd.tcp = Some(address);
    }
    if let Some(dir) = &args.nbd_tls {
        (config.nbd.tls, config.nbd.plain) = (Some(absolute(dir)?), false);
    }
    if args.nbd_plain {
        (config.nbd.tls, config.nbd.plain) = (None, true);
    }
    config.log.json |= args.log_json;
    if !args.iscsi.is_empty() {
        config.iscsi.portals.clone_from(&args.iscsi);
    }
    let serving = Serving {
        nbd_tcp: config.nbd.ready()?,
        iscsi: config.iscsi.ready()?,
        reserve: config.backup.ready()?,
    };
    daemon::serve(&home, &daemon::Options { log: config.log, serving })
}

/// `config`: needs no daemon.
fn config(cli: &Cli, verb: &ConfigVerb) -> Outcome {
    let home = Home::find(cli.global.home.as_deref())?;
    let named = match verb {
        ConfigVerb::Check { file } | ConfigVerb::Show { file } => file.as_deref(),
    };
    let (config, file) = Config::load(&home, named)?;
    let mut row = serde_json::json!({"file": file});
    if let ConfigVerb::Show { .. } = verb {
        row["text"] = toml::to_string(&config).unwrap_or_default().into(); // plain data always serialises
    }
    row["config"] = serde_json::to_value(&config).unwrap_or_default(); // the same
    row["verdict"] = match file {
        Some(_) => "good",
        None => "there is no file; these are the defaults",
    }
    .into();
    output(&cli.global).object(&row, columns::CONFIG).map_err(stdout_failed)
}

async fn status(cli: &Cli, home: &Home) -> Outcome {
    let view = Client::running(home).await?.get("/api/v1/daemon").await?;
    output(&cli.global).object(&view, columns::DAEMON).map_err(stdout_failed)
}

/// Asks the daemon to end and waits until it has; fine when none runs.
pub async fn stop(home: &Home) -> Outcome {
    if !HomeLock::is_free(home) {
        Client::running(home).await?.send(Method::POST, "/api/v1/daemon/stop", None).await?;
    }
    for _ in 0..6000 {
        if HomeLock::is_free(home) {
            return Ok(());
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    Err(Problem::new("KGM-SRV-0007", Kind::Failed, "the daemon does not end")
        .why("it was asked a minute ago"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_page_of_the_manual_can_be_made() {
        let dir = std::env::temp_dir().join(format!("kagami-man-{}", std::process::id()));
        man(Some(&dir)).unwrap();
        assert!(dir.join("kagami.1").exists() && dir.join("kagami-lun.1").exists());
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn usage_errors_of_checks_are_not_corruption() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert!(checks(&words("kagami vmfs check --nonsense")));
        assert!(checks(&words("kagami backup verify")));
        assert!(!checks(&words("kagami lun ls --nonsense")));
    }
}

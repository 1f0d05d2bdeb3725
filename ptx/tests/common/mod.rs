//! Finds and runs `ptxas`, NVIDIA's assembler, for the tests. It needs no GPU.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use pagewise_ptx::{Kernel, receipt::fingerprint};

/// What `ptxas -v` says of one kernel on one GPU generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Resources {
    pub(crate) registers: u32,
    pub(crate) shared: u32,
    pub(crate) spills: u32,
}

/// The assembler, and the folder where results are kept by the fingerprint of what was assembled.
pub(crate) struct Ptxas {
    program: PathBuf,
    version: String,
    cache: PathBuf,
}

impl Ptxas {
    /// Looks at `$PTXAS`, then at what `scripts/install-ptxas` installs, then on the `PATH`. `None`,
    /// after a loud line, when there is none; with `CI=true` that fails the test instead.
    pub(crate) fn find() -> Option<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let candidates = std::env::var_os("PTXAS")
            .map(PathBuf::from)
            .into_iter()
            .chain([root.join(".tools/ptxas/nvidia/cu13/bin/ptxas"), PathBuf::from("ptxas")]);
        for program in candidates {
            if let Ok(output) = Command::new(&program).arg("--version").output()
                && output.status.success()
            {
                let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("ptxas");
                std::fs::create_dir_all(&cache).unwrap();
                let version = String::from_utf8_lossy(&output.stdout).into_owned();
                return Some(Self { program, version, cache });
            }
        }
        let advice = "ptxas was found neither in $PTXAS, nor in .tools/ptxas, nor on the PATH; \
                      ./scripts/install-ptxas installs it (36 MB, no GPU needed)";
        assert!(std::env::var("CI").as_deref() != Ok("true"), "{advice}");
        // Past the test harness, which keeps eprintln! of a passing test to itself.
        let _ = writeln!(std::io::stderr(), "SKIPPED: {advice}");
        None
    }

    /// Assembles a kernel for `arch` (`"sm_90a"`), or finds the result of an earlier run.
    pub(crate) fn assemble(&self, kernel: &Kernel, arch: &str) -> Result<Resources, String> {
        let key = fingerprint(&format!("{}\n{arch}\n{}", self.version, kernel.text()));
        let kept = self.cache.join(format!("{key}.txt"));
        let log = match std::fs::read_to_string(&kept) {
            Ok(log) => log,
            Err(_) => {
                let log = self.run(kernel, arch, &key)?;
                // Renamed into place, so that a test run beside this one never reads half a log.
                let partial = self.cache.join(format!("{key}.{}.partial", std::process::id()));
                std::fs::write(&partial, &log).and_then(|()| std::fs::rename(&partial, &kept)).unwrap();
                log
            }
        };
        parse(&log).ok_or_else(|| format!("{} for {arch}: cannot read the log:\n{log}", kernel.entry()))
    }

    fn run(&self, kernel: &Kernel, arch: &str, key: &str) -> Result<String, String> {
        let source = self.cache.join(format!("{key}.{}.ptx", std::process::id()));
        std::fs::write(&source, kernel.text()).unwrap();
        let output = Command::new(&self.program)
            .args([
                "-v",
                "--warn-on-spills",
                "--warn-on-local-memory-usage",
                "-arch",
                arch,
                "-o",
                "/dev/null",
            ])
            .arg(&source)
            .output()
            .unwrap();
        std::fs::remove_file(&source).unwrap();
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() {
            Ok(log)
        } else {
            Err(format!("{} does not assemble for {arch}:\n{log}", kernel.entry()))
        }
    }
}

/// Reads the lines `… 0 bytes spill stores, 0 bytes spill loads` and `Used 32 registers, …, 512 bytes smem`.
fn parse(log: &str) -> Option<Resources> {
    let number_before = |line: &str, what: &str| -> Option<u32> {
        line.split(what).next()?.split_whitespace().next_back()?.parse().ok()
    };
    let spill_line = log.lines().find(|line| line.contains("bytes spill stores"))?;
    let used_line = log.lines().find(|line| line.contains("Used ") && line.contains(" registers"))?;
    Some(Resources {
        registers: number_before(used_line, " registers")?,
        shared: if used_line.contains(" bytes smem") { number_before(used_line, " bytes smem")? } else { 0 },
        spills: number_before(spill_line, " bytes spill stores")?
            + number_before(spill_line, " bytes spill loads")?,
    })
}

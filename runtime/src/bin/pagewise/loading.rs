//! Loading a model with something to look at: a spinner for stages, a bar for downloads. Nothing is drawn when
//! stderr is not a terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use pagewise_runtime::load::{LoadOptions, LoadProgress, LoadedModel, load};

use crate::Failure;

/// Loads the model. With `verbose` the log says the same in lines, which a bar would tear apart.
pub(crate) fn load_model(options: &LoadOptions, verbose: u8) -> Result<LoadedModel, Failure> {
    let mut display = Display::new(verbose == 0);
    let loaded = load(options, &mut |progress| display.show(progress));
    display.bar.finish_and_clear();
    let loaded = loaded.map_err(Failure::error)?;
    if let Some(threads) = options.threads {
        // The backend has a pool of its own; sampling runs in the process's, which is ours to size here. Were it
        // in use already, it would keep its size and nothing else would change.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    }
    Ok(loaded)
}

struct Display {
    bar: ProgressBar,
    visible: bool,
    /// The file whose download the bar shows; a spinner otherwise.
    download: Option<String>,
}

impl Display {
    fn new(visible: bool) -> Self {
        let bar = ProgressBar::hidden();
        Self { bar, visible, download: None }
    }

    fn show(&mut self, progress: LoadProgress<'_>) {
        match progress {
            LoadProgress::Stage(stage) => {
                self.download = None;
                self.replace(|| {
                    let spinner = ProgressBar::new_spinner();
                    spinner.enable_steady_tick(Duration::from_millis(100));
                    spinner
                });
                self.bar.set_message(stage);
            }
            LoadProgress::Download { file, done, total } => {
                if self.download.as_deref() != Some(file) {
                    self.download = Some(file.to_owned());
                    self.replace(|| {
                        let style = "{msg} {wide_bar} {bytes} of {total_bytes}, {eta} left";
                        let style = ProgressStyle::with_template(style);
                        ProgressBar::new(total)
                            .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
                    });
                    self.bar.set_message(file.to_owned());
                }
                self.bar.set_length(total);
                self.bar.set_position(done);
            }
        }
    }

    fn replace(&mut self, new: impl FnOnce() -> ProgressBar) {
        self.bar.finish_and_clear();
        if self.visible {
            // Draws on stderr, and nothing where that is not a terminal.
            self.bar = new();
        }
    }
}

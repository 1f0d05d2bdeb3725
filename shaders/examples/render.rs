//! Prints the rendered text of a kernel variant, or the list of all variants.
//!
//! ```text
//! cargo run -p pagewise-shaders --example render                            # the list
//! cargo run -p pagewise-shaders --example render -- write_kv_f32_bf16_vec4  # one text
//! ```

use std::process::ExitCode;

fn main() -> ExitCode {
    let shaders = match pagewise_shaders::all_shaders() {
        Ok(shaders) => shaders,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    let Some(wanted) = std::env::args().nth(1) else {
        for shader in &shaders {
            println!("{}{}", shader.name(), if shader.needs_f16() { " (needs shader-f16)" } else { "" });
        }
        return ExitCode::SUCCESS;
    };
    match shaders.iter().find(|shader| shader.name() == wanted) {
        Some(shader) => {
            print!("{}", shader.text());
            ExitCode::SUCCESS
        }
        None => {
            eprintln!("there is no variant {wanted}; run this without an argument for the list");
            ExitCode::FAILURE
        }
    }
}

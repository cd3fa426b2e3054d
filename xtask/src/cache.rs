//! What is kept between runs, outside the checkout.

use anyhow::Context as _;
use std::path::PathBuf;

/// `$XDG_CACHE_HOME/pageferry/{name}`, or the same in `~/.cache`.
pub(crate) fn folder(name: &str) -> anyhow::Result<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    set("XDG_CACHE_HOME")
        .filter(|p| p.is_absolute())
        .or_else(|| Some(set("HOME")?.join(".cache")))
        .map(|base| base.join("pageferry").join(name))
        .context("there is no cache folder: neither XDG_CACHE_HOME nor HOME is set")
}

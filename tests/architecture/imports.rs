//! Reads which file of a crate imports which.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// That one file imports another, or (`to` is `None`) that it exists.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Import {
    /// The file's path from the crate's `src`.
    pub(crate) from: String,
    pub(crate) line: usize,
    pub(crate) to: Option<String>,
}

/// All imports between the files under `src`. Tests inside files don't count, nor does what
/// `lib.rs` has at its root.
pub(crate) fn imports_of(src: &Path) -> Vec<Import> {
    let mut files = BTreeMap::new();
    read(src, "", &mut files);
    let modules: BTreeMap<Vec<String>, &String> =
        files.keys().map(|file| (module_of(file), file)).collect();
    let mut imports = Vec::new();
    for (file, text) in &files {
        imports.push(Import {
            from: file.clone(),
            line: 1,
            to: None,
        });
        for (line, path) in paths(text) {
            let target = resolve(&module_of(file), &path, &modules);
            imports.extend(target.filter(|target| target != file).map(|to| Import {
                from: file.clone(),
                line,
                to: Some(to),
            }));
        }
    }
    imports
}

/// What is wrong with these imports: each fault with its file and line.
pub(crate) fn faults(imports: &[Import], floors: &[&[&str]]) -> Vec<String> {
    let floor_of = |module: &str| floors.iter().position(|floor| floor.contains(&module));
    let mut faults = Vec::new();
    for Import { from, .. } in imports.iter().filter(|import| import.to.is_none()) {
        if floor_of(room(from)).is_none() {
            faults.push(format!("{from}:1: `{}` is on no floor", room(from)));
        }
    }
    for Import { from, line, to } in imports {
        let Some(to) = to else { continue };
        let (here, there) = (room(from), room(to));
        let (Some(floor), Some(target)) = (floor_of(here), floor_of(there)) else {
            continue;
        };
        if here != there && target >= floor {
            let which = if target == floor {
                "the same"
            } else {
                "a higher"
            };
            faults.push(format!(
                "{from}:{line}: `{here}` imports `{there}`, which is on {which} floor"
            ));
        }
    }
    faults.extend(circles(imports));
    faults.dedup();
    faults
}

/// Circles among the files of one folder. (Others have an import that points up.)
fn circles(imports: &[Import]) -> Vec<String> {
    let mut next: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for Import { from, to, .. } in imports {
        let inside = to.as_deref().filter(|to| room(from) == room(to));
        next.entry(from).or_default().extend(inside);
    }
    let mut found = Vec::new();
    for Import { from, line, to } in imports {
        let Some(to) = to.as_deref().filter(|to| room(from) == room(to)) else {
            continue;
        };
        if let Some(way) = way(to, from, &next)
            && way.iter().all(|file| **file >= **from)
        {
            let way = way.join(" -> ");
            found.push(format!("{from}:{line}: a circle: {from} -> {way}"));
        }
    }
    found
}

/// The shortest way from a file to another.
fn way<'a>(
    from: &'a str,
    to: &str,
    next: &BTreeMap<&'a str, BTreeSet<&'a str>>,
) -> Option<Vec<&'a str>> {
    let mut ways = vec![vec![from]];
    let mut seen = BTreeSet::from([from]);
    while !ways.is_empty() {
        if let Some(way) = ways.iter().find(|way| way.last() == Some(&to)) {
            return Some(way.clone());
        }
        let mut longer = Vec::new();
        for way in ways {
            let last = way.last().and_then(|last| next.get(last));
            for file in last.into_iter().flatten() {
                if seen.insert(file) {
                    longer.push(way.iter().copied().chain([*file]).collect());
                }
            }
        }
        ways = longer;
    }
    None
}

/// The module at the crate's root that a file belongs to.
fn room(file: &str) -> &str {
    let end = file.find('/').unwrap_or(file.len());
    file[..end].trim_end_matches(".rs")
}

fn read(folder: &Path, prefix: &str, files: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() {
            read(&path, &format!("{prefix}{name}/"), files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.insert(
                format!("{prefix}{name}"),
                fs::read_to_string(&path).unwrap(),
            );
        }
    }
}

fn module_of(file: &str) -> Vec<String> {
    let path = file.trim_end_matches(".rs").split('/');
    let names = path.filter(|name| !matches!(*name, "lib" | "mod"));
    names.map(str::to_string).collect()
}

/// The file that a path names: that of the longest part of it which is a module.
fn resolve(
    module: &[String],
    path: &[String],
    modules: &BTreeMap<Vec<String>, &String>,
) -> Option<String> {
    let mut full = match path.first()?.as_str() {
        "crate" => Vec::new(),
        "super" => module[..module.len().checked_sub(1)?].to_vec(),
        _ => module.to_vec(),
    };
    let is_keyword = |name: &String| matches!(name.as_str(), "crate" | "super" | "self");
    let is_ours = is_keyword(path.first()?);
    let start = full.len();
    for name in path.iter().skip(usize::from(is_ours)) {
        if name == "super" {
            full.pop();
            continue;
        }
        full.push(name.clone());
        if !modules.contains_key(&full) {
            full.pop();
            break;
        }
    }
    if !is_ours && full.len() == start {
        return None; // another crate, or an item of this file
    }
    modules.get(&full).map(|file| (*file).clone())
}

/// The paths that a file imports or writes out from the crate's root, with their lines.
fn paths(text: &str) -> Vec<(usize, Vec<String>)> {
    let is_test =
        |line: &&str| line.starts_with("#[cfg(test)]") || line.starts_with("#[cfg(all(test");
    let mut found = Vec::new();
    let mut lines = text.lines().take_while(|line| !is_test(line)).enumerate();
    while let Some((index, line)) = lines.next() {
        let is_inside = line.starts_with(' '); // of a module in the file, whose `super` is the file
        let line = line.split("//").next().unwrap_or(line).trim();
        let words = line.strip_prefix("pub").map_or(line, |rest| {
            rest.split_once(") ").map_or(rest, |(_, rest)| rest)
        });
        if let Some(tree) = words.trim().strip_prefix("use ") {
            let mut tree = tree.to_string();
            while !tree.contains(';') {
                let Some((_, more)) = lines.next() else { break };
                tree.push_str(more.trim());
            }
            let tree = tree.split(';').next().unwrap_or_default();
            if !(is_inside && tree.starts_with("super::")) {
                flatten(tree, &[], &mut |path| found.push((index + 1, path)));
            }
            continue;
        }
        for (at, _) in line.match_indices("crate::") {
            let is_path = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
            let path: String = line[at..].chars().take_while(|c| is_path(*c)).collect();
            if !line[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_') {
                let names = path.split("::").map(str::to_string);
                found.push((index + 1, names.collect()));
            }
        }
    }
    found
}

/// Takes a `use` tree apart.
fn flatten(tree: &str, prefix: &[String], found: &mut dyn FnMut(Vec<String>)) {
    let mut depth = 0;
    let mut start = 0;
    let mut branches = Vec::new();
    for (at, c) in tree.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                branches.push(&tree[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    branches.push(&tree[start..]);
    for branch in branches.iter().map(|branch| branch.trim()) {
        let (path, rest) = branch.split_once('{').unwrap_or((branch, ""));
        let path = path.split(" as ").next().unwrap_or(path);
        let names = path
            .split("::")
            .map(str::trim)
            .filter(|name| !name.is_empty());
        let names: Vec<String> = prefix
            .iter()
            .cloned()
            .chain(names.map(str::to_string))
            .collect();
        if let Some(inner) = rest.strip_suffix('}') {
            flatten(inner, &names, found);
        } else if names.len() > prefix.len() {
            found(names);
        }
    }
}

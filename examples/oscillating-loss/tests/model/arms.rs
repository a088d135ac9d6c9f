//! Lists of arms.

use oscillating_loss::arms::Arms;

fn texts(list: &str) -> Vec<String> {
    let arms: Arms = list.parse().unwrap();
    arms.0.iter().map(ToString::to_string).collect()
}

#[test]
fn options_stay_with_their_arm() {
    assert_eq!(texts("norm:1.0"), ["norm:1.0"]);
    assert_eq!(texts(Arms::STORY), ["none", "norm:1.0", "value:0.1"]);
    assert_eq!(
        texts(
            "none, zclip:z_thresh=2.5,warmup=25 ,norm:max_norm=1,eps=0,auto,auto:50,window=9,adagc"
        ),
        [
            "none",
            "zclip:z_thresh=2.5,warmup=25",
            "norm:max_norm=1,eps=0",
            "auto",
            "auto:50,window=9",
            "adagc"
        ]
    );
}

#[test]
fn a_list_of_any_arms_is_read_back() {
    let arms = [
        "none",
        "none:non_finite=error",
        "norm:1",
        "norm:1,norm_type=inf",
        "value:0.1",
        "param-norm:1",
        "block-rms:max_rms=1,eps=1e-8",
        "auto:10",
        "quantile:0.9,rate=0.1",
        "zclip",
        "zclip:mode=mean,skip=true",
        "adagc:warmup=5",
        "agc:clipping=0.1,exclude=*.bias|head.*",
        "value:0.1+norm:1",
        "value:0.1,eps=0+zclip:z_thresh=2,warmup=3",
        "skip",
        "skip:norm=5",
        "skip:z=3,max_norm=1,max_skips=2",
    ];
    for first in arms {
        for second in arms {
            for third in ["skip:norm=5,z=3", "adagc"] {
                assert_eq!(
                    texts(&format!("{first},{second},{third}")),
                    [first, second, third]
                );
            }
        }
    }
}

#[test]
fn what_is_no_list_of_arms_is_refused() {
    for wrong in [
        "",
        ",",
        "norm:1,",
        ",norm:1",
        "norm:1,,auto",
        "warmup=3",
        "none,2",
        "norm:1,zlcip",
        "auto=1",
    ] {
        assert!(wrong.parse::<Arms>().is_err(), "{wrong}");
    }
    let error = "norm:1,window=3".parse::<Arms>().unwrap_err().to_string();
    assert!(error.contains("`norm` has no option `window`"), "{error}");
}

#[test]
fn an_arm_given_twice_is_refused() {
    let list = |text: &str| text.parse::<Arms>().unwrap();
    assert_eq!(
        Arms::join(&[list("none,auto"), list("adagc")])
            .unwrap()
            .len(),
        3
    );
    for [first, second] in [
        ["norm:1,norm:1.0", "auto"],
        ["norm:1", "auto,norm:1."],
        ["auto", "auto:10"],
    ] {
        let error = Arms::join(&[list(first), list(second)])
            .unwrap_err()
            .to_string();
        assert!(error.contains("the same"), "{error}");
    }
}

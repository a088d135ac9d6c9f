//! Arms: their names, what they do, their folders.

use candle_grad_clip::{Clip, NonFinite};
use oscillating_loss::arm::Arm;

fn arm(text: &str) -> Arm {
    text.parse().unwrap()
}

#[test]
fn an_arm_is_called_what_it_was_given_as() {
    for text in [
        "none",
        "norm:1.0",
        "zclip:z_thresh=2.0,warmup=50",
        "auto",
        "value:1+norm:2",
    ] {
        assert_eq!(arm(text).to_string(), text);
        assert_eq!(arm(text).clip(NonFinite::SkipStep), clip(text));
    }
    assert_eq!(arm(" zclip: z_thresh = 2 ").to_string(), "zclip:z_thresh=2");
    assert_eq!(Arm::from(Clip::norm(0.5)).to_string(), "norm:0.5");
}

fn clip(text: &str) -> Clip {
    let clip: Clip = text.parse().unwrap();
    if text == "none" {
        clip.non_finite(NonFinite::Propagate)
    } else {
        clip
    }
}

#[test]
fn what_does_the_same_is_the_same() {
    assert_eq!(arm("norm:1.0"), arm("norm:max_norm=1"));
    assert_eq!(arm("none"), Arm::from(Clip::none()));
    assert_ne!(arm("norm:1"), arm("norm:2"));
    assert_ne!(arm("none"), arm("none:non_finite=skip_step"));
    assert_ne!(arm("norm:1"), arm("norm:1,non_finite=skip_step"));
    assert!(arm("none:max_skips=3").is_none() && !arm("none+norm:1").is_none());
}

#[test]
fn the_text_decides_on_nan_before_the_option_does() {
    let skip = NonFinite::SkipStep;
    let error = Clip::norm(1.0).non_finite(NonFinite::Error);
    assert_eq!(arm("norm:1,non_finite=error").clip(skip), error);
    assert_eq!(arm("norm:1").clip(NonFinite::Error), error);
    assert_eq!(arm("none:non_finite=skip_step").clip(skip), Clip::none());
    let unprotected = Clip::none().non_finite(NonFinite::Propagate);
    assert_eq!(arm("none").clip(NonFinite::Error), unprotected);
}

#[test]
fn only_a_limit_of_the_norm_is_one() {
    assert_eq!(arm("norm:0.5,eps=0").max_norm(), Some(0.5));
    assert_eq!(arm("norm:eps=0,max_norm=2").max_norm(), Some(2.0));
    for other in ["none", "value:0.1", "zclip:max_norm=1", "param-norm:1"] {
        assert_eq!(arm(other).max_norm(), None, "{other}");
    }
}

#[test]
fn folders_have_names_that_windows_allows() {
    assert_eq!(arm("norm:1.0").folder(), "norm-1.0");
    assert_eq!(arm("norm:1.").folder(), "norm-1");
    assert_eq!(
        arm("zclip:z_thresh=2,warmup=50").folder(),
        "zclip-z_thresh=2,warmup=50"
    );
    assert_eq!(
        arm("agc:exclude=*.bias|head.*").folder(),
        "agc-exclude=-.bias-head.-"
    );
    assert_eq!(arm("value:0.1+norm:1").folder(), "value-0.1+norm-1");
}

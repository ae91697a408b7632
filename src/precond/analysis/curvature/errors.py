"""What a curvature measurement refuses to answer, by kind."""

from __future__ import annotations


class CurvatureError(ValueError):
    """A curvature is not defined, or was not measured well enough, for what was asked."""


class NoSecondDerivative(CurvatureError):
    """The loss, a kernel or a function of the model cannot be differentiated twice."""


class NotSymmetric(CurvatureError):
    """A map is not symmetric where only the eigenvalues of a symmetric one are computed."""


class NotResolved(CurvatureError):
    """A number was not resolved: products ran out, or it lies below the precision floor."""


class Indefinite(CurvatureError):
    """κ or κ₊ was asked of a matrix that has a negative eigenvalue."""


class Singular(CurvatureError):
    """κ was asked of a matrix that has a null eigenvalue, or κ₊ where null and positive ones are not apart."""


class CoupledSamples(CurvatureError):
    """The loss of one sample depends on another sample, so that its second derivatives do not separate."""

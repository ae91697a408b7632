"""The Hessian of single neurons, H_e S H_eᵀ (Ye, Theorem 3)."""

from precond.analysis.curvature.neurons.curvatures import unit_curvatures
from precond.analysis.curvature.neurons.form import LayerInputs, NeuronHessian, Signs
from precond.analysis.curvature.neurons.measure import neuron_hessian, neuron_hessians

__all__ = ["LayerInputs", "NeuronHessian", "Signs", "neuron_hessian", "neuron_hessians", "unit_curvatures"]

from .op import DensityPeaks, dpc_knn, dpc_knn_varlen

__all__ = ["DensityPeaks", "dpc_knn", "dpc_knn_varlen"]

from __future__ import annotations
import cv2
import numpy as np

def blur(image, sigma):
    """Gaussian of sigma px, on a reduced image for large sigma; same size as image."""
    return cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101)

def bands(stains, scale, sigmas):
    """log rms of difference-of-Gaussian bands, and cross-stain correlation, skewness per band. sigmas in um."""
    out={}
    prev={n:getattr(stains,n) for n in ("hematoxylin","eosin")}
    last=0.0
    for s in sigmas:
        px=s/scale
        cur={n:blur(getattr(stains,n), px) for n in prev}
        d={n:prev[n]-cur[n] for n in prev}
        tag=f"{s:g}um"
        v={n:float(np.mean(np.square(a))) for n,a in d.items()}
        for n in d:
            out[f"{n}.band_{tag}"]=np.log(np.sqrt(v[n])+.01)
            m3=float(np.mean(d[n]*d[n]*d[n]))
            out[f"{n}.skew_{tag}"]=np.cbrt(m3)/(np.sqrt(v[n])+.01)
            out[f"{n}.kurt_{tag}"]=float(np.mean(np.abs(d[n])))/(np.sqrt(v[n])+.01)
        out[f"stains.corr_{tag}"]=float(np.mean(d["hematoxylin"]*d["eosin"]))/(np.sqrt(v["hematoxylin"]*v["eosin"])+1e-4)
        prev=cur
    return out

def fibres(image, scale, grads, window):
    """structure tensor"""
    out={}
    for s in grads:
        g=blur(image, s/scale)
        gx=cv2.Scharr(g,cv2.CV_32F,1,0,scale=1/32); gy=cv2.Scharr(g,cv2.CV_32F,0,1,scale=1/32)
        xx,yy,xy=gx*gx,gy*gy,gx*gy
        e=float(np.mean(xx+yy)); eps=1e-4
        out[f"aligned_{s:g}um"]=np.hypot(float(np.mean(xx-yy)),2*float(np.mean(xy)))/(e+eps)
        f=max(1,int(window*s/scale/2))
        n=image.shape[0]//f
        J=cv2.resize(cv2.merge([xx+yy,xx-yy,2*xy]),(n,n),interpolation=cv2.INTER_AREA)
        J=blur(J,window*s/scale/f)
        num=np.hypot(J[...,1],J[...,2])
        out[f"coherence_{s:g}um"]=float(np.mean(num))/(e+eps)
        out[f"coherence_flat_{s:g}um"]=float(np.mean(num/(J[...,0]+eps)))
        out[f"gradient_{s:g}um"]=np.log(np.sqrt(e)+.003)
    return out

_T=np.zeros(256,np.uint8)
for _c in range(256):
    b=[(_c>>k)&1 for k in range(8)]; tr=sum(b[k]!=b[k-1] for k in range(8))
    _T[_c]=sum(b) if tr<=2 else 9
def lbp(image, scale, radii, margin):
    out={}
    for r_um in radii:
        r=max(1,int(round(r_um/scale)))
        g=blur(image, r_um/scale/2)
        h,w=g.shape
        c=g[r:h-r,r:w-r]+margin
        code=np.zeros(c.shape,np.uint8)
        for k,(dy,dx) in enumerate([(-1,-1),(-1,0),(-1,1),(0,1),(1,1),(1,0),(1,-1),(0,-1)]):
            code|=(cv2.compare(g[r+dy*r:h-r+dy*r,r+dx*r:w-r+dx*r],c,cv2.CMP_GT)&(1<<k)).astype(np.uint8)
        hist=np.bincount(cv2.LUT(code,_T).ravel(),minlength=10)/code.size
        for k in range(10): out[f"lbp_{r_um:g}um_{k}"]=float(np.sqrt(hist[k]))
    return out

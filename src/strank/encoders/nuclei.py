from __future__ import annotations
import cv2
import numpy as np
from scipy.spatial import cKDTree
from .texture import blur

def segment(h, scale, low=0.3, high=0.6, smooth=0.8, sigma=2.0, peak=0.03):
    s=blur(h, smooth/scale)
    u=np.clip(s*100,0,255).astype(np.uint8)
    t=cv2.threshold(u,0,255,cv2.THRESH_OTSU)[0]/100
    t=min(max(t,low),high)
    mask=(s>t).astype(np.uint8)
    mask=cv2.morphologyEx(mask,cv2.MORPH_OPEN,np.array([[0,1,0],[1,1,1],[0,1,0]],np.uint8))
    b=blur(h,sigma/scale)
    dog=b-blur(h,1.6*sigma/scale)
    w=int(2*round(1.5*sigma/scale/2)+1)
    el=cv2.getStructuringElement(cv2.MORPH_ELLIPSE,(w,w))
    el=el|el.T
    pk=(cv2.dilate(dog,el)<=dog)&(dog>peak)&(mask>0)
    if not pk.any(): return np.zeros(h.shape,np.int32),0,mask,t,0
    _,lab=cv2.distanceTransformWithLabels(1-pk.astype(np.uint8),cv2.DIST_L2,5,labelType=cv2.DIST_LABEL_CCOMP)
    ncomp=cv2.connectedComponents(mask)[0]-1
    lab=lab*mask
    return lab,int(lab.max()),mask,t,ncomp

def describe(stains, od, scale, tissue_mm2, low=0.3, high=0.6):
    h=stains.hematoxylin
    lab,n,mask,t,ncomp=segment(h,scale,low,high)
    mm2=h.size*scale**2*1e-6
    out={}
    idx=np.flatnonzero(lab)
    l=lab.ravel()[idx]; y,x=np.divmod(idx,h.shape[1])
    a=np.bincount(l,minlength=n+1)[1:].astype(float)
    keep=a*scale**2>=8
    def per(v): return np.bincount(l,weights=v,minlength=n+1)[1:]
    aa=np.maximum(a,1)
    mx,my=per(x)/aa,per(y)/aa
    xx=per(x*x)/aa-mx**2+1/12; yy=per(y*y)/aa-my**2+1/12; xy=per(x*y)/aa-mx*my
    half=np.sqrt(((xx-yy)/2)**2+xy**2); mid=(xx+yy)/2
    major,minor=np.sqrt(mid+half),np.sqrt(np.maximum(mid-half,1/12))
    hv=h.ravel()[idx].astype(float); hm=per(hv)/aa; hs=np.sqrt(np.maximum(per(hv*hv)/aa-hm**2,0))
    ar=aa*scale**2
    elong=np.log(major/minor); solid=np.minimum(ar/(4*np.pi*major*minor*scale**2),1.2)
    o=od.reshape(-1,3)[idx]; red=per(o[:,0])/aa; blue=per(o[:,2])/aa; green=per(o[:,1])/aa
    hue_b=blue/(red+.05); hue_g=green/(red+.05)
    K=keep
    k=int(K.sum())
    def shr(v,prior,c=2.0): return (float(v[K].sum())+c*prior)/(k+c)
    props=dict(log_area=(np.log(ar),3.6,.5),elongation=(elong,.4,.2),solidity=(solid,.95,.05),intensity=(hm,.8,.1),chromatin=(hs,.15,.05),blue=(hue_b,.4,.1),green=(hue_g,.8,.1))
    out["density"]=np.sqrt(k/mm2)
    out["share"]=float(mask.mean())
    out["threshold"]=t
    out["clumping"]=np.log((k+2)/(ncomp+2))
    for name,(v,p,sd) in props.items():
        m=shr(v,p); out[f"{name}.mean"]=m; out[f"{name}.sd"]=np.sqrt(shr((v-m)**2,sd**2))
    spind=1/(1+np.exp(-(elong-.6)/.1)); big=1/(1+np.exp(-(np.log(ar)-np.log(60))/.15)); small=1/(1+np.exp((np.log(ar)-np.log(30))/.15))
    dark=1/(1+np.exp(-(hm-.9)/.08))
    for name,v in dict(spindle=spind,large=big,small_round=small*(1-spind),dark=dark,large_pale=big*(1-dark),small_dark=small*dark).items():
        out[f"{name}.density"]=np.sqrt(float(v[K].sum())/mm2); out[f"{name}.share"]=shr(v,.3)
    w=(elong*K); c2=(xx-yy)/2/np.maximum(half,1e-6); s2=xy/np.maximum(half,1e-6)
    out["aligned"]=float(np.hypot((w*c2).sum(),(w*s2).sum())/(w.sum()+1))
    pts=np.c_[mx,my][K]*scale
    if k>=2:
        kk=min(k,6); d=cKDTree(pts).query(pts,k=kk)[0]
        d1=d[:,1]; dk=d[:,-1]
    else: d1=dk=np.array([])
    out["nearest"]=(np.log(d1+1).sum()+2*np.log(40))/(len(d1)+2)
    out["nearest_sd"]=np.sqrt((((np.log(d1+1)-out["nearest"])**2).sum()+2*.16)/(len(d1)+2))
    out["fifth"]=(np.log(dk+1).sum()+2*np.log(80))/(len(dk)+2)
    c=(h.shape[0]-1)/2; r=np.hypot(mx-c,my-c)*scale
    if h.shape[0]*scale>=100:
        out["density_disc"]=np.sqrt((K&(r<50)).sum()/(np.pi*.05**2))
    # non nuclear
    rest=(mask==0)&(stains.density>.12); kr=rest.sum(); 
    for nme,img in (("eosin",stains.eosin),("hematoxylin",stains.hematoxylin),("density",stains.density)):
        v=img[rest]; p={"eosin":.03,"hematoxylin":.2,"density":.2}[nme]; c0=.02*h.size
        m=(float(v.sum())+c0*p)/(kr+c0); out[f"rest_{nme}.mean"]=m; out[f"rest_{nme}.sd"]=np.sqrt((float(((v-m)**2).sum())+c0*.0025)/(kr+c0))
    out["rest_share"]=float(rest.mean())
    return out
